"""Values that facts are about: fixed lists, most of them of made-up words, so that their number is known exactly."""

from __future__ import annotations

from itertools import product

_HEADS = "Bar Cel Dor Fen Gal Hol Ild Jar Kel Lum Mar Nor Osk Pel Quin Ros Sil Tam Ven Wil".split()  # 20
_TAILS = (
    "ana bert cia dan ella fred gwyn helm isa jon kin lora mund nia ott pia ric sela tor una".split()
)  # 20
_MIDDLES = "Ab Br Cor Dal Em Fal Gr Har Is Jul Kor Lan Mel Nev Or Pry Rad Sor Tal Ush".split()  # 20
_ENDS = (
    "adine ael ander aro eth evar ian ida iel igan ilo imar ion oda olan onna oric ulia umi yra".split()
)  # 20
_LAST = "Ash Bram Cald Drum Eck Fair Grim Hart Ing Jess".split()  # 10
_LAST_MIDDLE = "el en er il in ing or ow un y".split()  # 10
_LAST_ENDS = "beck by dale ford ham ley more shaw stone ton".split()  # 10
_PLACES = (
    "Arden Bel Carn Dun Elm Fox Glen Hazel Iron Jun Kirk Long Mill Oak Pine Raven Salt Thorn West York"
).split()  # 20
_PLACE_ENDS = "bridge bury field gate haven hurst mouth port ridge wick".split()  # 10
_SCHOOLS = (
    "College Institute University Academy Conservatory Polytechnic Seminary School Lyceum Faculty".split()
)
_FIELDS = (
    "Biology Chemistry Design Economics Geology History Linguistics Mathematics Music Physics".split()
)  # 10
_KINDS = "Applied Comparative Computational Experimental General Industrial Maritime Modern Pure Theoretical".split()
_FIRMS = (
    "Alder Bright Crown Delta Ember Falcon Granite Harbor Indigo Jupiter Kestrel Lantern Meridian".split()
)  # 13
_TRADES = (
    "Analytics Breweries Chemicals Dynamics Energy Foods Glass Holdings Instruments Journals Kitchens Logistics "
    "Motors Networks Optics Paper Quarries Robotics Shipping Textiles"
).split()  # 20
_MONTHS = ("January February March April May June July August September October November December").split()

FIRST = tuple("".join(parts) for parts in product(_HEADS, _TAILS))  # 400
MIDDLE = tuple("".join(parts) for parts in product(_MIDDLES, _ENDS))  # 400
LAST = tuple("".join(parts) for parts in product(_LAST, _LAST_MIDDLE, _LAST_ENDS))  # 1000
CITY = tuple("".join(parts) for parts in product(_PLACES, _PLACE_ENDS))  # 200
UNIVERSITY = tuple(f"{place} {school}" for place, school in product(_PLACES, _SCHOOLS))  # 200
MAJOR = tuple(" ".join(parts) for parts in product(_KINDS, _FIELDS))  # 100
EMPLOYER = tuple(" ".join(parts) for parts in product(_FIRMS, _TRADES))  # 260
BIRTH = tuple(
    f"{month} {day}, {year}" for month, day, year in product(_MONTHS, range(1, 29), range(1900, 2100))
)  # 67,200

# Where facts are about things and not about people.
KINDS = "Archive Bureau Circle Gallery Garden Guild Library Observatory Society Workshop".split()
RIVERS = tuple(f"{head}{end}" for head, end in product(_LAST, ("a", "ey", "ister", "onne", "une")))  # 50
SUBJECTS = tuple(
    f"{adjective} {thing}"
    for adjective, thing in product(
        "ancient blue coastal desert early frozen giant hidden nocturnal painted".split(),
        "bells beetles bridges clocks comets ferns maps mosses shells tides".split(),
    )
)  # 100

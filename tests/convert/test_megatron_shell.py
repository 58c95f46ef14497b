"""Launch scripts are read as bash would read them, and nothing in them is run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.convert.shell_script import read_script
from megatron_davinci.errors import ConfigError

COMMANDS = Path(__file__).parent / "commands"
BASH = shutil.which("bash")
# Prints each word that it is called with between two characters that stand in no word.
STUBS = "torchrun() { printf '\\x01%s\\x02' \"$@\"; }\nmkdir() { :; }\n"
needs_bash = pytest.mark.skipif(BASH is None, reason="bash is the judge")


def words_of_bash(script: str, folder: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [str(BASH), "-c", STUBS + script + "\ntrue", "script", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [word.removeprefix("\x01") for word in done.stdout.split("\x02")[:-1]]


def words_here(script: str, **known: str) -> list[str]:
    commands = read_script(script, "script", known).commands
    return [word.text for command in commands if command[0].text == "torchrun" for word in command[1:]]


@needs_bash
@pytest.mark.parametrize("name", ["llama3_8b.sh", "mistral_7b.sh", "gpt3_857m.sh"])
def test_published_commands_have_the_words_that_bash_passes_on(name, tmp_path):
    (tmp_path / "pretrain_gpt.py").touch()
    script = (COMMANDS / name).read_text().replace("> log.txt 2>&1", "")
    arguments = ["/save", "/data", "/vocabulary", "/merges", "/text"]
    known = {str(number): value for number, value in enumerate(arguments, start=1)} | {"PWD": str(tmp_path)}
    theirs = words_of_bash(script, tmp_path, *arguments)
    assert len(theirs) > 40
    assert words_here(script, **known) == theirs


@needs_bash
def test_sums_of_a_scripts_arguments_are_what_bash_makes_of_them(tmp_path):
    script = "torchrun $(( ${1} * $2 - 1 )) $(($1/${2}+${10}))"
    arguments = ["17", "2", *"345678", "9", "40"]
    known = {str(number): value for number, value in enumerate(arguments, start=1)}
    assert words_here(script, **known) == words_of_bash(script, tmp_path, *arguments) == ["33", "48"]


SCRIPTS = {
    "quotes": """X='a  b'; Y="c $X \\$X"; torchrun $X "$X" '$X' "$Y" x"$X"y a\\ b ''""",
    "arrays": """A=(one "two words" 'three'); A+=(four)
        torchrun ${A[@]} "${A[@]}" $A ${A[1]} "x${A[@]}y" "${A[*]}" """,
    "appending": """X=a; X+=b; X+=" c"; torchrun "$X" $X""",
    "defaults": """E=
        torchrun ${U:-a b} "${U:-a b}" ${E:-x} "${E-y}" ${U:-${V:-deep}} ${E:+no} ${U+no} "${U:-"q r"}" """,
    "sums": """N=4; torchrun $((N*3+1)) $(( ($N + 2) * 2 - 7/2 )) $((10%4-1)) $((7 - 2 - 1))""",
    "continuations": "torchrun a \\\n  b\\\nc \\\n d # e\n",
    "comments": "A=(1 # one\n 2)\n# torchrun no\ntorchrun ${A[@]} a#b '#c'",
    "conditions": """D=fp8
        if [[ "$D" == "bf16" ]]; then X=1; elif [ "$D" = fp8 ] && [[ -n $D ]]; then X=2; else X=3; fi
        if [ 3 -lt 2 ]; then X=9; fi; [[ $X == 2 ]] && Y=yes || Y=no; [ -z "$Y" ] && Y=empty
        if [[ ! ( $X == 3 || -z $X ) ]]; then if [ $X -ge 2 ]; then Z=in; fi; else Z=out; fi
        torchrun $X $Y $Z""",
    "declarations": """export A=1 B="2 3"; readonly C=$A; torchrun $A "$B" $C""",
    "several on a line": """A=1; B=2 && torchrun $A $B; true || torchrun no""",
    "redirections": """torchrun a 2>&1 2>/dev/null b < /dev/null""",
    "variable with flags": """O="--a 1 \\\n  --b 2 "; torchrun $O ${O} "$O" """,
    "here document": """cat > /dev/null <<EOF\ntorchrun no\nEOF\ntorchrun yes""",
}


@needs_bash
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_grammar_is_bashs(name, tmp_path):
    theirs = words_of_bash(SCRIPTS[name], tmp_path)
    assert theirs
    assert words_here(SCRIPTS[name]) == theirs


PIECES = st.sampled_from(
    ["a", "-1", "$X/", "${X}", '"$X"', "'$X'", '"${A[@]}"', "${A[@]}", "${A[*]}", "$((2*3))", " ", "  ", "\\\n",
     "\\ ", '""', "x=", "${U:-d e}", '"${U:-d e}"', "${A[1]}", "$A.", "--f", '"b c"', "\\$", '"\\"q\\""', "#", ","]
)  # fmt: skip


@needs_bash
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=8, max_size=8))
def test_any_words_are_those_of_bash(tmp_path_factory, lines):
    script = "X='v  w'\nA=(p 'q r')\n" + "\n".join(f"torchrun first {line}\n" for line in lines)
    assert words_here(script) == words_of_bash(script, tmp_path_factory.getbasetemp())


def test_nothing_is_run_and_no_file_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "touch one\nX=$(touch two)\nY=`touch three`\necho x > four\ntorchrun $X $Y $(touch five)\nsource six\n"
    found = read_script(script, "script", {}).commands
    assert list(tmp_path.iterdir()) == []
    assert [[word.text for word in command] for command in found if command[0].text == "torchrun"] == [
        ["torchrun", "$(touch two)", "$(touch three)", "$(touch five)"]
    ]


def test_what_is_not_known_stays_as_it_is_written_and_is_marked():
    (words,) = read_script("torchrun $X ${Y%.txt} a$1/b <path to data>/c", "script", {}).commands
    assert [(word.text, word.unknown) for word in words[1:]] == [
        ("$X", ("$X",)),
        ("${Y%.txt}", ("${Y%.txt}",)),
        ("a$1/b", ("$1",)),
        ("<path to data>/c", ("<path to data>",)),
    ]


def test_of_a_sum_what_is_known_is_worked_into_what_is_not():
    (words,) = read_script("N=4; torchrun $(( $1 / ${2} * N ))", "script", {"1": "8"}).commands
    assert [(word.text, word.unknown) for word in words[1:]] == [
        ("$(( 8 / ${2} * 4 ))", ("$(( 8 / ${2} * 4 ))",)),
    ]


def test_words_have_the_lines_that_they_are_written_on():
    script = "A=(\n  --x\n  1\n)\nO=' --y \\\n 2\n --z '\ntorchrun ${A[@]} \\\n  $O \\\n  --w\n"
    (words,) = read_script(script, "script", {}).commands
    lines = {word.text: word.line for word in words}
    assert (lines["--x"], lines["1"], lines["--y"], lines["--z"], lines["--w"]) == (2, 3, 5, 7, 10)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ('for X in 1 2; do\n  A+=(--lost $X)\ndone\ntorchrun "${A[@]}"', 1),
        ("\ncase $X in\n a) A=--lost;;\nesac\ntorchrun $A", 2),
        ("f() {\n  torchrun --lost\n}\nf", 1),
        ('if [ -f there ]; then\n  A="--lost 1"\nfi\ntorchrun $A', 1),
        ("[ -d there ] && A=(--lost)\ntorchrun ${A[@]}", 1),
        ("cat <<X\ntorchrun --lost\nX\n", 2),
        ("if nvidia-smi; then A=--lost; fi\ntorchrun $A", 1),
        ("F=0\nif (( F )); then A=--lost; fi\ntorchrun $A", 2),
        ("N=1\nif (( N == 1 )); then :; else A=--lost; fi\ntorchrun $A", 2),
        ("F=0\n(( F > 2 )) && A=--lost\ntorchrun $A", 2),
    ],
)
def test_a_passage_that_cannot_be_read_is_named_with_its_line_and_its_flags(script, line):
    found = read_script(script, "script", {})
    assert [(passage.line, [f.text for f in passage.flags]) for passage in found.unread] == [
        (line, ["--lost"])
    ]
    for command in found.commands:  # and nothing is made of it
        assert all("--lost" not in word.text for word in command)


@pytest.mark.parametrize(
    "script", ["X='a", 'echo "a', "X=(a b", "echo ${X", "echo $(a", "echo `a", "X=(a; b)"]
)
def test_what_does_not_end_is_refused_with_its_line(script):
    with pytest.raises(ConfigError) as caught:
        read_script("\n" + script, "run.sh", {})
    assert caught.value.where == "run.sh:2"


@pytest.mark.parametrize(
    "script",
    [
        "X=aaaaaaaaaaaaaaaa\n" + 'X="$X$X$X$X"\n' * 40,
        "A=(a b c d)\n" + 'A=("${A[@]}" "${A[@]}" "${A[@]}")\n' * 40,
        "if true; then\n" * 3000 + "fi\n" * 3000,
        "echo " + "${A:-" * 3000 + "}" * 3000,
    ],
)
def test_a_script_that_would_not_end_is_refused(script):
    with pytest.raises(ConfigError, match=r"The script cannot be read"):
        read_script(script, "run.sh", {})


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="ab1-$(){}[]\"'\\`#<>|&;=+@*:\n \t!/%,.", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        read_script(text, "script", {})
    except ConfigError as error:
        assert str(error.where).startswith("script")  # noqa: PT017


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("if false; then A=--no; else A=--yes; fi\ntorchrun $A", ["--yes"]),
        ("F=false\nif $F; then A=--no; else A=--yes; fi\ntorchrun $A", ["--yes"]),
        ("F=false\nif ! $F; then A=--yes; fi\ntorchrun $A", ["--yes"]),
        ("F=false\nA=--yes\n$F && A=--no\ntorchrun $A", ["--yes"]),
        ("F=true\n$F && A=--yes\ntorchrun $A", ["--yes"]),
        ("F=false\nif [ $F ]; then A=--yes; fi\ntorchrun $A", ["--yes"]),
    ],
)
def test_a_word_by_itself_is_a_command_but_in_brackets(script, words):
    (command,) = read_script(script, "script", {}).commands
    assert [word.text for word in command[1:]] == words


@pytest.mark.parametrize("what", ["A[0]=5", "unset A", "read -r A < file", "source more.sh"])
def test_what_changes_variables_by_what_is_not_read_is_listed(what):
    found = read_script(f"A=2\n{what}\ntorchrun --x $A", "script", {})
    assert [passage.line for passage in found.unread] == [2]
    assert [bool(word.unknown) for word in found.commands[-1][1:]] == [False, what != "source more.sh"]

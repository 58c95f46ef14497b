"""The controller's section: bounds that cannot be held are refused, all of them at once."""

import pytest

from megatron_davinci.config import validate
from megatron_davinci.errors import ConfigError
from tests.config.small import settings as small


def settings(**controller):
    return small(
        data={"validation": {"web": "valid/a", "code": "valid/b"}},
        evaluation={"every_steps": 5},
        controller={"mode": "apply", **controller},
    )


def refusal(made):
    with pytest.raises(ConfigError) as error:
        validate(made, where="test")
    return error.value.render()


def test_the_default_is_off_and_asks_nothing():
    assert validate(small(), where="test").controller.mode == "off"
    assert validate(settings(), where="test").controller.policy == "saturation"


@pytest.mark.parametrize(
    "controller, said",
    [
        ({"floors": {"web": 0.7, "code": 0.7}}, "sum to 1.4"),
        ({"ceilings": {"web": 0.3, "code": 0.3}}, "sum to 0.6"),
        ({"floors": {"web": 0.7}, "ceilings": {"web": 0.2}}, "above its ceiling"),
        ({"floors": {"c": 0.1}}, "names c; there is code, web"),
        ({"floors": {"code": 0.9}}, "outside floors and ceilings"),
        ({"maximum_change": 0.0001}, "at least 0.001"),
        ({"maximum_change": 0.00100001}, "more than six decimals"),
        ({"floors": {"web": "1/3"}}, "more than six decimals"),
        ({"floors": {"web": "nonsense"}}, "not a number"),
        ({"stages": ["nowhere"]}, "names nowhere"),
        ({"policy": "domain_upsampling", "domain_upsampling": {"mixture": {"web": 0.5}}}, "sums to 0.5"),
        ({"policy": "specialised"}, "specialised.domain: say which is the small one of code, web"),
        ({"policy": "loss_weighted", "loss_weighted": {"reference": {"web": 1.0}}}, "lacks code"),
        ({"policy": "best"}, "policy"),
    ],
)
def test_what_cannot_be_is_refused(controller, said):
    assert said in refusal(settings(**controller))


def test_every_problem_is_said_at_once():
    made = settings(floors={"web": 0.7, "code": 0.7}, ceilings={"c": 0.5})
    made["evaluation"] = {}
    said = refusal(made)
    assert "sum to 1.4" in said and "names c" in said and "evaluation.every_steps" in said


@pytest.mark.parametrize(
    ("stages", "every"),
    [(None, {"one": 0, "two": 0}), (["one"], {"two": 3}), (["one"], {"one": 0, "two": 3})],
)
def test_it_decides_at_evaluations_of_its_stages(stages, every):
    made = settings(stages=stages)
    second = {**made["curriculum"][0], "name": "two"}
    made["curriculum"].append(second)
    if "one" not in every:
        made["evaluation"] = {}
    for stage in made["curriculum"]:
        stage["evaluate_every_steps"] = every.get(stage["name"])
    assert "evaluation.every_steps" in refusal(made)
    made["curriculum"][0]["evaluate_every_steps"] = 2
    validate(made, where="test")


def test_a_policy_that_looks_at_losses_needs_them():
    made = settings()
    made["data"]["validation"] = {"web": "valid/a"}
    assert "data.validation lacks code" in refusal(made)


def test_a_policy_that_looks_at_none_decides_at_evaluations_too():
    upsampling = {"mixture": {"web": 0.5, "code": 0.5}}
    made = settings(policy="domain_upsampling", domain_upsampling=upsampling)
    validate(made, where="test")
    made["data"]["validation"] = {}
    assert "data.validation is empty: nothing is evaluated" in refusal(made)


def test_off_may_be_written_as_yaml_reads_it():
    assert validate(settings(mode=False), where="test").controller.mode == "off"

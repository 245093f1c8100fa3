"""What the objective needs is checked across sections, and what it can do without is not asked
for.
"""

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

MATH = "teachers.main.route={domain:math}"
CODE = "+teachers.code={path: builtin:countdown-teacher, route: {domain: code}, weight: 0.1}"


def settings_of(*overrides: str) -> RunSettings:
    return load_config(["run.dir=here", "experiment=quickstart", *overrides])


def sentence_of(*overrides: str) -> str:
    """The sentence by which these settings are refused."""
    with pytest.raises(ConfigError) as caught:
        settings_of(*overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 240
    return sentence


# -- the weights of the teachers -------------------------------------------------------------------


def test_a_student_that_would_only_move_away_from_its_start_is_refused():
    assert sentence_of("algorithm=g_opd", "~teachers.main") == (
        "teachers={initial}: their weights add up to -0.2, and must to more than 0, or the student "
        "moves away from them without a bound; add the teacher to imitate, +teachers.main=PATH"
    )


def test_the_only_teacher_of_an_experiment_is_not_turned_around_by_a_preset():
    with pytest.raises(ConfigError, match=r"^teachers={initial}: their weights add up to -0\.2"):
        load_config(["run.dir=here", "experiment=smollm2_arithmetic", "algorithm=g_opd"])


def test_the_prompts_of_each_route_have_a_teacher_that_draws_the_student():
    """0.1 - 0.2 of the prompts about code, where 1 - 0.2 of those about mathematics is enough."""
    assert settings_of("algorithm=g_opd", f"+{MATH}").scored_teachers == ["initial", "main"]
    assert sentence_of("algorithm=g_opd", f"+{MATH}", CODE).startswith(
        "teachers={initial, main, code}: their weights with route={'domain': 'code'} add up to -0.1"
    )


def test_teachers_that_score_nothing_may_have_any_weight():
    weight = "+teachers.main.weight=-1"
    assert settings_of("algorithm=rloo", weight).scored_teachers == []
    assert settings_of("algorithm=dpo", weight).scored_teachers == ["initial"]

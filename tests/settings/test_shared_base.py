"""The settings of a teacher that uses the learner's weights without its adapters."""

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.run_dir.setting_changes import changes
from hybridrl.runtime.workers import teams
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

SHARED = ("lora.rank=4", "teachers.main.path=null", "+teachers.main.share_base=true")


def settings(*overrides: str) -> RunSettings:
    return load_config(["run.dir=here", "experiment=quickstart", *overrides])


def test_a_teacher_has_weights_of_its_own_unless_it_says_otherwise():
    assert not settings().teachers["main"].share_base
    assert settings().shared_teachers == []


def test_no_scorer_is_started_for_a_teacher_for_which_the_learner_scores():
    one = settings(*SHARED, "+teachers.big.path=builtin:countdown-teacher")
    assert one.scored_teachers == ["main", "big"]
    assert (one.shared_teachers, one.teachers_with_scorers) == (["main"], ["big"])
    assert [t.name for t in teams(one) if t.name.startswith("scorer")] == ["scorer-big"]
    replicas = ["train.prompts_per_step=4", "rollout.groups_per_chunk=4", "scorer.replicas=2"]
    with pytest.raises(ConfigError, match=r"^scorer\.replicas=2: a step has 1 chunks"):
        settings(*SHARED, "+teachers.big.path=builtin:countdown-teacher", *replicas)
    assert settings(*SHARED, *replicas).teachers_with_scorers == []


@pytest.mark.parametrize(
    "override",
    [
        "teachers.main.path=builtin:countdown-student",
        "+teachers.main.dtype=float32",
        "+teachers.main.evidence=drawn",
    ],
)
def test_the_student_before_training_may_be_named_as_itself(override: str):
    model = "model.dtype=float32"
    assert settings(*SHARED, model, override).shared_teachers == ["main"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["lora.rank=null"],
            r"^teachers\.main\.share_base=true: scores by the weights that adapters leave as they "
            r"are, and without lora\.rank all weights train; set lora\.rank, e\.g\. to 16, or "
            r"share_base=false$",
        ),
        (
            ["teachers.main.path=builtin:countdown-teacher"],
            r"^teachers\.main\.path=builtin:countdown-teacher: with teachers\.main\."
            r"share_base=true the teacher is the student before training, model\.path=builtin:"
            r"countdown-student; set teachers\.main\.path=null, or share_base=false$",
        ),
        (
            ["model.path=me/it", "teachers.main.path=me/it", "+teachers.main.revision=v2"],
            r"^teachers\.main\.revision=v2: with teachers\.main\.share_base=true the teacher is "
            r"the student before training, model\.revision=None; set teachers\.main\.path=null and "
            r"leave the revision out$",
        ),
        (
            ["model.dtype=float32", "+teachers.main.dtype=bfloat16"],
            r"^teachers\.main\.dtype=bfloat16: with teachers\.main\.share_base=true the teacher "
            r"has the learner's weights, in model\.dtype=float32; leave it out, or set "
            r"share_base=false$",
        ),
        (
            ["+teachers.main.devices=2"],
            r"^teachers\.main\.devices=2: divides a model that a scorer loads, and with "
            r"teachers\.main\.share_base=true the learner scores; set learner\.ranks or "
            r"learner\.zero_stage=3 in its place$",
        ),
        (
            ["+teachers.main.model=mine.py:Mine"],
            r"^teachers\.main\.share_base=true: scores by the learner's own weights, and "
            r"teachers\.main\.model=mine\.py:Mine is another model; leave one of them out$",
        ),
        (
            ["+teachers.main.url=http://there:8000/v1", "+teachers.main.evidence=drawn"],
            r"^teachers\.main\.share_base=true: .* teachers\.main\.url=http://there:8000/v1 is "
            r"another model; leave one of them out$",
        ),
        (
            ["+teachers.main.engine={}", "+teachers.main.evidence=drawn"],
            r"^teachers\.main\.share_base=true: .* teachers\.main\.engine=\{\} is another model; "
            r"leave one of them out$",
        ),
    ],
)
def test_a_teacher_that_is_not_the_student_before_training_is_refused(
    overrides: list[str], sentence: str
):
    with pytest.raises(ConfigError, match=sentence):
        settings(*SHARED, *overrides)


def test_a_run_may_continue_with_a_scorer_in_the_place_of_the_learner():
    assert not changes(settings(*SHARED), settings(*SHARED[:2]))
    assert changes(settings(*SHARED), settings("lora.rank=4"))

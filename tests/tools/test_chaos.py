"""tools/chaos: the card and the findings that it stores, and the bounds on times."""

import json
import re
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
import ray
from chaos_faults import finding, matrix, ray_options, workers
from chaos_faults.finding import Finding, Made, Row
from chaos_faults.training import prompts_against

from hybridrl.run_dir.ledger import Ledger

ROOT = Path(__file__).parent.parent.parent
IDS = (
    "R1 R2 K1 K2 K3 K4 E1 E2 E3 E4 E5 E6 W1 W2 L1 L2 T1 T2 V1 V2 V3 V4 N1 G1 G2 O1 O2 O3 C1 "
    "C2 C3 C4 J1 J2 J3 J4 X1 X2 F1"
)


def row(key: str, *, passed: bool) -> Row:
    result = Finding(
        passed=passed,
        outcome="killed | seen",
        detected_s=0.5,
        recovered_s=21.4,
        lost_steps=2,
        lost_uids=0,
        duplicated_uids=1,
    )
    return Row(
        id=key,
        fault="engine killed",
        proof="tests/controller/test_graph.py",
        seconds=60.0,
        finding=result,
    )


def test_every_fault_is_there_once_and_its_proof_is_a_file():
    assert Counter(fault.id for fault in matrix.MATRIX) == Counter(IDS.split())
    assert [fault.id for fault in matrix.MATRIX if not (ROOT / fault.proof).is_file()] == []


def test_every_word_that_selects_tests_of_a_fault_is_in_the_name_of_one():
    """If a word selects no test, a fault is silently not tested, or fails because it has no
    tests.
    """
    unused = []
    for fault in matrix.MATRIX:
        if isinstance(fault.do, str):
            files, _, words = fault.do.partition(" -k ")
            text = "".join((ROOT / file).read_text() for file in files.split())
            names = re.findall(r"^def (test_\w+)", text, re.MULTILINE)
            assert names, fault.id
            unused += [
                (fault.id, word)
                for word in words.split("|")
                if not any(word in name for name in names)
            ]
    assert unused == []


def test_the_card_is_put_together_from_pieces_and_names_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, path in {
        "RESULTS": tmp_path,
        "FINDINGS": tmp_path / "f.json",
        "CARD": tmp_path / "c.md",
    }.items():
        monkeypatch.setattr(finding, name, path)
    order = ["E1", "E2", "L1"]
    made = Made(machine="2 cores", commit="abc")
    finding.store([row("E2", passed=False)], order, made)
    finding.store([row("E1", passed=True)], order, made)
    finding.store([row("E2", passed=True)], order, made)
    card = (tmp_path / "c.md").read_text()
    assert "2 of 2 rows pass; not run: L1" in card and list(
        json.loads((tmp_path / "f.json").read_text())
    ) == ["E1", "E2"]
    assert (
        "| [E1](../../../tests/controller/test_graph.py) | engine killed | 0.50 s | 21 s | 2 | 0 "
        "/ 1 | pass | killed / seen |" in card
    )
    assert (
        "All at commit abc in several runs. Detected in 0.50 s (median), 0.50 s (most) over 2 "
        "faults; recovered in 21 s (median), 21 s" in card
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.md", "f.json"]


def on_file(key: str, **made: object) -> dict:
    return asdict(row(key, passed=True)) | made


def test_the_card_says_at_which_commit_and_whether_in_one_run():
    whole = [on_file(key, commit="abc", whole_minutes=61.7) for key in ("E1", "E2")]
    assert finding.provenance(whole) == "All at commit abc in one run of 62 min."
    assert (
        finding.provenance([whole[0], on_file("E2", commit="abc", whole_minutes=None)])
        == "All at commit abc in several runs."
    )
    mixed = [*whole, on_file("L1", commit="def+", whole_minutes=None), on_file("T1")]
    assert (
        finding.provenance(mixed)
        == "2 were run at commit abc, 2 at other commits (1 at def+, 1 at unknown)."
    )


def test_the_median_and_the_most_leave_out_faults_without_a_time():
    times = [(0.1, None), (3.0, 20.0), (12.0, 60.0), (None, None)]
    rows = [
        {"finding": {"detected_s": detected, "recovered_s": recovered}}
        for detected, recovered in times
    ]
    assert finding.summary(rows) == (
        "Detected in 3.00 s (median), 12 s (most) over 3 faults; recovered in 40 s (median), 60 s "
        "(most) over 2 faults."
    )
    assert finding.summary(rows[3:]) == ""


def test_a_fault_of_a_worker_has_a_bound_on_both_times_and_the_finding_says_which_was_missed():
    assert workers.RECOVERED_S.keys() == {*workers.STRIKES, "E3"}
    assert workers.check_bounds(1.0, 2.0, 59.0, 60.0) == (True, "bounds 2 s and 60 s")
    assert workers.check_bounds(1.0, 2.0, 61.0, 60.0) == (False, "bounds 2 s and 60 s MISSED")
    assert workers.check_bounds(3.0, 2.0, 59.0, 60.0) == (False, "bounds 2 s MISSED and 60 s")


def test_prompts_are_lost_or_trained_twice_against_the_run_without_a_fault(tmp_path: Path):
    for name, trained in {"clean": ["a", "b", "c"], "ours": ["a", "a", "c"]}.items():
        (tmp_path / name).mkdir()
        with closing(Ledger(tmp_path / name, 0)) as ledger:
            ledger.record(1, trained)
            ledger.record(2, ["d"] if name == "clean" else [])
    assert prompts_against(tmp_path / "ours", tmp_path / "clean", 1) == (1, 1), (
        "b is lost, a came twice"
    )
    assert prompts_against(tmp_path / "ours", tmp_path / "clean", 2) == (2, 1)


def test_ray_is_the_version_whose_options_were_read():
    """After an upgrade, read the code that tools/chaos_faults/ray_options.py lists, then change
    VERSION.
    """
    assert ray.__version__.rpartition(".")[0] == ray_options.VERSION


def test_ray_has_each_option_that_a_fault_sets():
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    program = raylet.read_bytes()
    variables = (
        ray_options.QUICK_HEALTH_CHECKS | ray_options.MEMORY_SHORT | ray_options.faulty_calls()
    )
    names = [variable.removeprefix("RAY_") for variable in variables]
    gone = [name for name in names if name.encode() not in program]
    assert not gone, f"Ray's raylet has no options {gone} any more, and would ignore them"


def test_a_worker_that_ray_has_just_started_is_one_of_its_own_processes():
    program = Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"
    assert program.is_file(), "Ray starts workers by another file"
    assert re.match(ray_options.RAYS_OWN, f"/usr/bin/python\0{program}\0--node-ip-address=x\0")
    assert not re.match(ray_options.RAYS_OWN, "ray::Host.call\0")

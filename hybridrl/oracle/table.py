"""`hybridrl check`: the table of all rows, computed on one CPU core in about a minute."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache

import torch

from hybridrl.oracle.cases import PLAIN, Case, World, cases
from hybridrl.oracle.user_rows import is_own_setting, user_rows
from hybridrl.oracle.verdict import Row, Scope, judge
from hybridrl.settings.compose import conf_dir, load_config

LIMIT = 2000
"""Largest number of sequences of the model without an end token; more would take minutes."""


def main(arguments: Sequence[str]) -> int:
    """Print the table, or the rows of the given settings; with --json a list of row objects.

    Returns:
        The exit status: 0 if all rows are as declared, 1 if a row of the table deviates or a row
        of given settings is biased, 2 for wrong arguments.
    """
    defaults = Scope()
    parser = argparse.ArgumentParser(
        prog="hybridrl check", description="Every method's gradient against exact enumeration."
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help="seed of the tiny models; with another seed, biases differ from the declared sizes "
        "but are bounded",
    )
    parser.add_argument(
        "--vocab",
        type=int,
        default=defaults.vocabulary,
        help="tokens of the model without an end token, at least 4",
    )
    parser.add_argument(
        "--horizon", type=int, default=defaults.horizon, help="steps of that model, at least 2"
    )
    parser.add_argument(
        "--json", action="store_true", help="a list of row objects instead of a table"
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings of algorithm, e.g. algorithm.advantage=file.py:Class: what their gradient "
        "is, in place of the table",
    )
    try:
        given = parser.parse_args(list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    error = argument_error(given.seed, given.vocab, given.horizon, given.settings)
    if error:
        print(error)
        return 2
    torch.set_num_threads(1)  # the tables are small, and threads would mostly wait for each other
    scope = Scope(seed=given.seed, vocabulary=given.vocab, horizon=given.horizon)
    if given.settings:
        rows = list(user_rows(given.settings, scope))
        return report_json(rows) if given.json else report_user_rows(rows)
    return report_json(all_rows(scope)) if given.json else report_table(all_rows(scope))


def argument_error(
    seed: int, vocabulary: int, horizon: int, settings: Sequence[str] = ()
) -> str | None:
    """An error sentence about the first wrong argument; None: all are right."""
    if seed < 0:
        return f"--seed {seed}: must not be negative; give 0 or more"
    if vocabulary < 4:
        return (
            f"--vocab {vocabulary}: must be at least 4, as rows compare supports of up to 4 "
            "tokens; raise it"
        )
    if horizon < 2:
        return f"--horizon {horizon}: must be at least 2, or there is no future cost; raise it"
    if vocabulary**horizon > LIMIT:
        return (
            f"--vocab {vocabulary} --horizon {horizon}: vocab^horizon is {vocabulary**horizon} "
            f"sequences, at most {LIMIT} are enumerated; lower one of them"
        )
    for setting in settings:
        if not is_own_setting(setting):
            return (
                f"{setting}: must be a setting of algorithm; write algorithm.KEY=VALUE, or "
                "algorithm=NAME for the preset to start from"
            )
    return None


def report_json(rows: Iterable[Row]) -> int:
    """Print all rows as JSON and return the exit status."""
    listed = list(rows)
    print(json.dumps([asdict(row) for row in listed], indent=1))
    return int(not all(row.agrees for row in listed))


def report_table(rows: Iterable[Row]) -> int:
    """Print each row as soon as it is computed, and return the exit status."""
    print(HEADER)
    agreeing = []
    for row in rows:
        print(line(row), flush=True)
        agreeing.append(row.agrees)
    print(f"{len(agreeing)} rows, {agreeing.count(False)} deviate. {FOOTER}")
    return int(not all(agreeing))


def report_user_rows(rows: Sequence[Row]) -> int:
    """Print the rows of given settings, for which nothing is declared, and return the exit
    status: 1 if a row is biased.
    """
    print(HEADER)
    for row in rows:
        print(line(row))
    biased = [row for row in rows if not row.agrees]
    largest = f", by up to {max(row.bias for row in biased):.3f}" if biased else ""
    start = f" {FOOTER}" if any(row.method == "hybrid" for row in rows) else ""
    print(f"{len(rows)} rows, {len(biased)} biased{largest}.{start}")
    return int(bool(biased))


def all_rows(scope: Scope) -> Iterator[Row]:
    """The row of every case, and of every preset without a case. The latter deviate, since nothing
    is declared for them.
    """
    listed = cases(scope.vocabulary)
    for case in listed:
        yield judge(case, scope)
    for method in sorted(online_methods() - {case.method for case in listed}):
        yield replace(
            judge(Case(method=method, group_size=2, world=World.tiny), scope),
            declared="nothing",
            agrees=False,
        )


@cache
def online_methods() -> frozenset[str]:
    """The presets that are not losses over pairs."""
    names = [path.stem for path in conf_dir().glob("algorithm/*.yaml")]
    made = {
        name: load_config(["run.dir=check", "experiment=quickstart", f"algorithm={name}"])
        for name in names
    }
    return frozenset(name for name, settings in made.items() if not settings.algorithm.ranks_pairs)


HEADER = (
    f"{'method':<14} {'option':<92} {'estimates':<19} {'bias':>8} {'cosine':>7} "
    f"{'variance':>9}  {'declared':<13} verdict"
)
FOOTER = (
    f"hybrid starts from {' '.join(PLAIN)}; options are settings under algorithm. Bias is "
    "relative, variance a trace per sample."
)


def line(row: Row) -> str:
    deviates = row.declared and not row.agrees
    verdict = f"{row.verdict}: DEVIATES" if deviates else row.verdict
    return (
        f"{row.method:<14} {row.option:<92} {row.estimates:<19} {row.bias:>8.3f} "
        f"{row.cosine:>7.3f} {row.variance:>9.3f}  {row.declared:<13} {verdict}"
    )

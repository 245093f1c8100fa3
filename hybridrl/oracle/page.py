"""Writes the results of `hybridrl check` as a page.

`python -m hybridrl.oracle.page > hybridrl/oracle/README.md` writes it.
"""

from collections.abc import Iterable, Sequence

from hybridrl.oracle.cases import PLAIN, methods
from hybridrl.oracle.table import all_rows
from hybridrl.oracle.verdict import Row, Scope

HEAD = """# Is the gradient right?

`hybridrl check` answers this question in about a minute on one CPU core. It runs the production
code, from the objective to the gradient at the logits, over every sequence of a language model that
is small enough to enumerate, and compares the mean with the gradient of a plain formula, taken by
finite differences in float64. Its exit status is 1 if a row differs from its declaration in
[cases.py](cases.py).

```bash
hybridrl check                # the table below
hybridrl check --seed 1       # other models; biases differ from the declared sizes but are bounded
hybridrl check --json         # a list of row objects
hybridrl check algorithm.advantage=mine.py:Mine    # your own estimator, token weight or pair loss
```

Settings of `algorithm` that are given, your own or built in, are checked in place of the table. No
verdict is declared for them, and the exit status is 1 if their gradient is biased.
[hybridrl/objectives](../objectives/README.md#your-own) has examples. The derivatives of a pair loss
are compared with finite differences of the loss.

The losses on ranked pairs have no rows in the table. A
[test](../../tests/objectives/test_presets.py) compares them, and every other preset, with a direct
implementation of the published formula.

## How to read a row

- *estimates*: the gradient with which the row is compared. `grad J` is the exact gradient of the
  objective J = E[ sum_t sum_i w_i D_i - lambda R ], which is minimised. The `semi-gradient` ignores
  the effect of a token on the imitation cost of later positions; distillation methods follow it.
  The `K-token divergence` is the divergence over the K tokens of the support alone.
- *bias*: |mean - claim| / |claim|. *cosine*: of the mean and the claim. *variance*: of the gradient
  from one sampled sequence, the trace of its covariance.
- *verdict*: `exact` (equal at every prefix, whatever was drawn), `unbiased` (equal in expectation)
  or `biased`, by design and by the size shown.
- `K=3`: siblings of one prompt. `[tiny]`: a model with 3 tokens and 2 steps, all of whose groups
  can be listed. `[ended]`: a model whose sequences end at different lengths. `[equal lengths]`: the
  preset divides by the lengths of responses, and the verdict is for responses of equal length.
- `sampler 0.3 away 99% learned`: the sampler's logits differ by 0.3 N(0, 1) from those of a student
  that is 99 % of the way to the teacher.
- `2nd update 0.2 away`: the second update of a batch (`train.updates_per_batch`), before which the
  first one has moved the student's logits by 0.2 N(0, 1). The sampler is near the student before
  the first update.
- Rows of `hybrid` start from PLAIN.

The numbers are those of the default seed.
"""

TABLE = """| method | option | estimates | bias | cosine | variance | verdict |
|---|---|---|---|---|---|---|"""


def page(rows: Sequence[Row]) -> str:
    """The text of README.md in this folder.

    Args:
        rows: the rows of all cases, in the order of cases().
    """
    presets = len(list(methods()))
    plain = " ".join(f"`{option}`" for option in PLAIN)
    return "\n".join(
        [
            HEAD.replace("PLAIN", plain),
            f"## The presets, {presets} of {len(rows)} rows\n\n{table(rows[:presets])}",
            f"## Their options, {len(rows) - presets} rows\n\n{table(rows[presets:])}",
        ]
    )


def table(rows: Iterable[Row]) -> str:
    return "\n".join([TABLE, *map(line, rows)]) + "\n"


def line(row: Row) -> str:
    option = row.option.removeprefix("as it is").strip()
    numbers = [f"{number:.3f}" for number in (row.bias, row.cosine, row.variance)]
    verdict = row.verdict if row.agrees else f"{row.verdict}: DEVIATES"
    cells = [row.method, option, row.estimates, *numbers, verdict]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(list(all_rows(Scope()))), end="")

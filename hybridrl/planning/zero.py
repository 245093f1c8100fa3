"""The bytes of one learner rank's weights, gradients and optimizer under ZeRO 1, 2 and 3.

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), with the settings of
policy/training_setup.py. P parameters, N ranks, g bytes a number in the model's dtype.
"""

from dataclasses import dataclass

BUCKET = 500_000_000
"""Numbers of the buffer in which gradients are summed, or as many as the model has
(policy.training_setup.bucket_numbers)."""

GATHERED = 1_000_000_000
"""Numbers of DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance: so many whole
weights stay gathered in stage 3."""

LIVE = 1_000_000_000
"""Numbers of DeepSpeed's sub_group_size in stage 3: parameters that are stepped at once."""

WIDE = 4  # bytes of a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroBytes:
    """Bytes of one rank."""

    weights: int  # of the forward pass
    gradients: int  # as they are summed over micro-batches
    optimizer: int  # master weights and both moments of Adam, float32
    always: int  # in every phase: the bucket of stage 3
    gathered: int  # whole weights during a forward and backward pass of stage 3
    reducing: int  # besides these, while gradients are summed over ranks
    stepping: int  # besides weights and optimizer, while Adam steps: the gradients' copies


def zero_bytes(
    parameters: int, *, width: int, ranks: int, stage: int, micro_batches: int
) -> ZeroBytes:
    """What one rank holds.

    Stage 1 adds the gradients of micro-batches in the model's dtype, 2 and 3 in float32. In float32
    stage 3 trains the weights themselves, without master weights besides.

    Example: Qwen2.5-7B in bfloat16, stage 1, 8 ranks: 2 P + 2 P + 12 P / 8 = 39.0 GiB.

    Args:
        parameters: P.
        width: g.
        micro_batches: of a rank and step.
    """
    share = -(-parameters // ranks)
    bucket = min(parameters, BUCKET)
    alone = ranks == 1 and stage == 1
    summed = bucket * (width if alone else WIDE)  # where gradients are put side by side
    if stage == 1:
        # All gradients move into the bucket, and this rank's share from there to a place of its
        # own, before they are laid end to end and widened.
        kept = width * share
        moved = 0 if parameters <= bucket else width * parameters
        flat = width * share + (WIDE * share if width < WIDE else 0)
        return ZeroBytes(
            weights=width * parameters,
            gradients=width * parameters,
            optimizer=3 * WIDE * share,
            always=0,
            gathered=0,
            reducing=max(summed + kept + moved - width * parameters, 0),
            stepping=kept + flat,
        )
    if stage == 2:
        again = WIDE * share if micro_batches > 1 else 0  # of the last micro-batch, widened
        return ZeroBytes(
            weights=width * parameters,
            gradients=WIDE * share,
            optimizer=3 * WIDE * share,
            always=0,
            gathered=0,
            reducing=summed + width * share + again,
            stepping=2 * WIDE * share,
        )
    copies = WIDE * min(share, LIVE)
    return ZeroBytes(
        weights=width * share,
        gradients=WIDE * share,
        optimizer=(3 if width < WIDE else 2) * WIDE * share,
        always=summed,
        gathered=width * min(parameters, GATHERED),
        reducing=summed,  # the bucket's parts in rank order
        stepping=WIDE * share + copies,
    )

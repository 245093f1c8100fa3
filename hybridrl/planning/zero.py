"""The bytes of one learner rank's weights, gradients and optimizer under ZeRO 1, 2 and 3, on its
device and, offloaded, in host memory.

Read in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), with the settings of
policy/training_setup.py. P parameters, N ranks, g bytes a number in the model's dtype. Parameters
that do not train, as beside adapters, are weights alone: they have no gradient and no master copy.
"""

from dataclasses import dataclass, replace

from hybridrl.settings.choices import Offload

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
    reducing: int  # besides these, while gradients are summed over ranks; from stage 2 on that
    # goes on during the backward pass
    stepping: int  # besides weights and optimizer, while Adam steps: the gradients' copies
    host: int = 0  # in host memory, in every phase


def zero_bytes(
    parameters: int,
    *,
    width: int,
    ranks: int,
    stage: int,
    micro_batches: int,
    frozen: int = 0,
    offload: Offload = Offload.none,
    largest: int = 0,
    overlaps: bool = False,
) -> ZeroBytes:
    """What one rank holds on its device, and in host memory.

    Example: Qwen2.5-7B in bfloat16 on one rank of stage 1 with adapters of rank 16, 40.4e6 numbers:
    2 x 7.616e9 + 16 x 40.4e6 = 14.8 GiB, where all weights would take 113.5 GiB.

    Args:
        parameters: P, those that train.
        frozen: parameters that do not.
        width: g.
        micro_batches: of a rank and step.
        offload: what is held in host memory.
        largest: numbers of the largest parameter that trains.
        overlaps: gradients are summed over ranks while the backward pass goes on.
    """
    trained = trained_bytes(
        parameters,
        width=width,
        ranks=ranks,
        stage=stage,
        micro_batches=micro_batches,
        offload=offload,
        largest=largest,
        overlaps=overlaps,
    )
    share = width * (-(-frozen // ranks) if stage == 3 else frozen)
    on_host = offload is Offload.parameters
    return replace(
        trained,
        weights=trained.weights + (0 if on_host else share),
        host=trained.host + (share if on_host else 0),
        gathered=width * min(parameters + frozen, GATHERED) if stage == 3 else 0,
    )


def trained_bytes(
    parameters: int,
    *,
    width: int,
    ranks: int,
    stage: int,
    micro_batches: int,
    offload: Offload,
    largest: int,
    overlaps: bool,
) -> ZeroBytes:
    """As zero_bytes, of the parameters that train alone."""
    zero = on_device(parameters, width=width, ranks=ranks, stage=stage, micro_batches=micro_batches)
    if overlaps and stage == 2:  # one bucket is filled while the other is summed
        zero = replace(zero, reducing=zero.reducing + width * min(parameters, BUCKET))
    if offload is Offload.none:
        return zero
    share = -(-parameters // ranks)
    if stage == 3:
        return offloaded_shards(zero, width * share, WIDE * share, offload)
    assert stage == 1, "settings refuse stage 2"
    return offloaded_optimizer(zero, share, width=width, largest=largest)


def offloaded_shards(zero: ZeroBytes, weights: int, wide: int, offload: Offload) -> ZeroBytes:
    """Stage 3 with its optimizer, or with all of its shard, in host memory.

    There are the summed gradients, Adam's input, master weights and both moments, float32 each: 20
    bytes a parameter and rank.

    Example: Qwen2.5-7B in bfloat16 on one rank: 20 P = 141.9 GiB in host memory and 2 P = 14.2 GiB
    on the device; with its parameters, 22 P = 156.0 GiB and nothing.

    Args:
        weights: bytes of the rank's share in the model's dtype.
        wide: in float32.
    """
    moves_weights = offload is Offload.parameters
    return replace(
        zero,
        weights=0 if moves_weights else weights,
        gradients=0,
        optimizer=0,
        stepping=0,
        host=5 * wide + (weights if moves_weights else 0),
    )


def offloaded_optimizer(zero: ZeroBytes, share: int, *, width: int, largest: int) -> ZeroBytes:
    """Stage 1 with its optimizer in host memory.

    There are Adam's input, master weights and both moments in float32; in the model's dtype the
    gradients of a rank's share, the new weights on their way to the device, and room for the
    largest gradient. The device keeps weights, gradients and the largest gradient once more.

    Example: Qwen2.5-7B in bfloat16 on one rank: 2 P + 2 P + 2 x 545e6 = 29.4 GiB on the device,
    16 P + 2 P + 2 P + 2 x 545e6 = 142.9 GiB in host memory.
    """
    return replace(
        zero,
        optimizer=0,
        always=width * largest,
        stepping=(width + (WIDE if width < WIDE else 0)) * largest,
        host=4 * WIDE * share + 2 * width * share + width * largest,
    )


def on_device(
    parameters: int, *, width: int, ranks: int, stage: int, micro_batches: int
) -> ZeroBytes:
    """What one rank holds without offloading.

    Stage 1 adds the gradients of micro-batches in the model's dtype, 2 and 3 in float32. There are
    master weights in float32 too, in every stage. Stage 2 fills a bucket in the model's dtype, puts
    the parts of each rank side by side once more and widens these; what it has summed of its share
    it adds up in place, or in float32, where nothing is widened, beside the sum so far.

    Example: Qwen2.5-7B in bfloat16, stage 1, 8 ranks: 2 P + 2 P + 12 P / 8 = 39.0 GiB.

    Args:
        parameters, width, micro_batches: as in zero_bytes.
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
        narrow = width < WIDE
        again = WIDE * share if micro_batches > 1 and not narrow else 0
        return ZeroBytes(
            weights=width * parameters,
            gradients=WIDE * share,
            optimizer=3 * WIDE * share,
            always=0,
            gathered=0,
            reducing=2 * width * bucket + (summed if narrow else 0) + again,
            stepping=2 * WIDE * share,
        )
    copies = WIDE * min(share, LIVE)
    return ZeroBytes(
        weights=width * share,
        gradients=WIDE * share,
        optimizer=3 * WIDE * share,
        always=summed,
        gathered=width * min(parameters, GATHERED),
        reducing=summed,  # the bucket's parts in rank order
        stepping=WIDE * share + copies,
    )

"""The bytes of one learner rank's weights, gradients and optimizer under ZeRO 1, 2 and 3, on its
device and, where offloaded, in host memory.

They follow from the code of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py) with the
settings of policy/training_setup.py. There are P parameters, N ranks, and g bytes a number in the
model's dtype. Parameters that do not train, such as those under adapters, have neither a gradient
nor a master copy.
"""

from dataclasses import dataclass, replace

from hybridrl.settings.choices import Offload

BUCKET = 500_000_000
"""Numbers of the buffer in which gradients are summed; fewer if the model has fewer
(policy.training_setup.bucket_numbers)."""

GATHERED = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance: the most parameters that
stay gathered in stage 3."""

LIVE = 1_000_000_000
"""DeepSpeed's sub_group_size in stage 3: the number of parameters that Adam updates at once."""

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
    """The bytes that one rank holds on its device, and in host memory.

    Example: Qwen2.5-7B in bfloat16 on one rank of stage 1 with adapters of rank 16, 40.4e6 numbers:
    2 x 7.616e9 + 16 x 40.4e6 = 14.8 GiB, where all weights would take 113.5 GiB.

    Args:
        parameters: P, the parameters that train.
        frozen: the parameters that do not train.
        width: g.
        micro_batches: those of a rank in one update.
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
    """As zero_bytes, for the parameters that train."""
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

    Host memory holds the summed gradients, Adam's input, master weights and both moments, each in
    float32: 20 bytes for each parameter of a rank's share.

    Example: Qwen2.5-7B in bfloat16 on one rank: 20 P = 141.9 GiB in host memory and 2 P = 14.2 GiB
    on the device; with the weights offloaded too, 22 P = 156.0 GiB and nothing on the device.

    Args:
        weights: bytes of the rank's share in the model's dtype.
        wide: bytes of the share in float32.
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

    Host memory holds Adam's input, master weights and both moments in float32 and, in the model's
    dtype, the gradients of a rank's share, the new weights before they are copied to the device,
    and room for the largest gradient. The device keeps weights, gradients and a second copy of the
    largest gradient.

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
    """The bytes that one rank holds without offloading.

    Stage 1 adds the gradients of micro-batches in the model's dtype, stages 2 and 3 in float32.
    Every stage also has master weights in float32. Stage 2 fills a bucket in the model's dtype,
    copies it with the parts of each rank side by side, and widens the copy to float32. Then it adds
    its part to the sum over earlier micro-batches, in place. A float32 model needs no widening; its
    new sum is made beside the old one.

    Example: Qwen2.5-7B in bfloat16, stage 1, 8 ranks: 2 P + 2 P + 12 P / 8 = 39.0 GiB.

    Args:
        parameters, width, micro_batches: as in zero_bytes.
    """
    share = -(-parameters // ranks)
    bucket = min(parameters, BUCKET)
    alone = ranks == 1 and stage == 1
    summed = bucket * (width if alone else WIDE)  # where gradients are put side by side
    if stage == 1:
        # All gradients move into the bucket. This rank's share moves from there to a place of its
        # own, and is then laid end to end and widened.
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

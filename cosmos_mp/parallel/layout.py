"""Whether a layout fits a run: asked before any network is built, answered with the values that would fit."""

from __future__ import annotations

from cosmos_mp.config import ConfigError, DiffusionConfig, HeadConfig, NetConfig, ParallelConfig
from cosmos_mp.models.embeddings import PATCH

WHOLE_CLIP_HEADS = ("attention", "spatial_temporal")


def divisors(*numbers: int) -> str:
    """Common divisors, as words."""
    return ", ".join(str(n) for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers))


def check_layout(options: ParallelConfig, world: int, net: NetConfig, diffusion: DiffusionConfig, head: HeadConfig | None = None) -> int:
    """The data-parallel size of a run over `world` processes.

    Args:
        head: of the discriminator, where the run has one.

    Raises:
        ConfigError: the layout does not fit the world, the networks or the clips; the message names what does.
    """
    dp = check_world(options, world)
    tp, cp = options.tp, options.cp
    _, frames, height, width = diffusion.latent_shape
    for name in ("heads", "mlp_hidden"):
        if getattr(net, name) % tp:
            raise ConfigError(
                f"parallel.tp={tp} does not divide net.{name}={getattr(net, name)}: give one of {divisors(net.heads, net.mlp_hidden)}"
            )
    if options.cp_attention == "ulysses" and net.heads % (tp * cp):
        raise ConfigError(
            f"net.heads={net.heads} is no multiple of parallel.tp={tp} x parallel.cp={cp} = {tp * cp}, as Ulysses needs: "
            f"make tp x cp one of {divisors(net.heads)}, or set parallel.cp_attention to ring"
        )
    if options.cp_ulysses and net.heads % (tp * options.cp_ulysses):
        raise ConfigError(
            f"net.heads={net.heads} is no multiple of parallel.tp={tp} x parallel.cp_ulysses={options.cp_ulysses}: "
            f"make their product one of {divisors(net.heads)}"
        )
    if frames % cp:
        raise ConfigError(f"parallel.cp={cp} does not divide the {frames} latent frames of a clip: give one of {divisors(frames)}")
    tokens = frames // cp * (height // PATCH) * (width // PATCH)
    if options.sequence_parallel and tokens % tp:
        raise ConfigError(
            f"parallel.tp={tp} does not divide the {tokens} tokens of a rank, as sequence_parallel needs: "
            f"give one of {divisors(tokens, net.heads, net.mlp_hidden)}, or leave it off"
        )
    if head is not None and cp > 1:
        _check_head(head, frames, cp)
    published = options.reference_cp_scaling
    if published and (published % cp or frames % published):
        fitting = [n for n in range(cp, frames + 1, cp) if frames % n == 0]
        raise ConfigError(
            f"parallel.reference_cp_scaling={published} must be a multiple of parallel.cp={cp} that divides the {frames} latent frames: "
            f"one of {', '.join(map(str, fitting))}, or 0"
        )
    return dp


def _check_head(head: HeadConfig, frames: int, cp: int) -> None:
    """Each rank's frames must give exactly their own share of the head's outputs."""
    own = frames // cp
    if head.kind in WHOLE_CLIP_HEADS:
        raise ConfigError(
            f"head.kind={head.kind} looks across all frames of a clip, which parallel.cp={cp} divides: "
            "use conv3d or conv2d, or set parallel.cp to 1"
        )
    if head.kind == "conv3d" and (own % 2 or head.first_frame % 2):
        fitting = [n for n in range(1, frames + 1) if frames % n == 0 and (n == 1 or frames // n % 2 == 0)]
        raise ConfigError(
            f"head.kind=conv3d joins frames in pairs (kernel = stride = 2 along T): with parallel.cp={cp} a rank holds {own} latent "
            f"frame(s), the first {head.first_frame} of a clip are left out, and a pair would lie on two ranks. Make both even "
            f"(parallel.cp one of {', '.join(map(str, fitting))}), or use conv2d"
        )
    if head.first_frame >= own:
        raise ConfigError(
            f"head.first_frame={head.first_frame} leaves nothing to judge on the first rank, which holds {own} of {frames} latent frames "
            f"with parallel.cp={cp}: lower either"
        )


def check_world(options: ParallelConfig, world: int) -> int:
    """The data-parallel size that `world` processes leave.

    Raises:
        ConfigError: they do not divide so; the message names what fits.
    """
    model, total = options.tp * options.cp, options.tp * options.cp * options.dp
    if world % model:
        raise ConfigError(
            f"parallel.tp={options.tp} x parallel.cp={options.cp} = {model} does not divide {world} process(es): "
            f"tp x cp must be one of {divisors(world)}, or start a multiple of {model} processes"
        )
    if options.dp and total != world:
        raise ConfigError(
            f"parallel.tp={options.tp} x parallel.cp={options.cp} x parallel.dp={options.dp} = {total}, but {world} process(es) were "
            f"started: start {total}, or set parallel.dp to {world // model} or 0"
        )
    ranks = world // options.tp
    if options.shard and ranks % options.shard:
        raise ConfigError(
            f"parallel.shard={options.shard} does not divide the {ranks} ranks of dp x cp: give one of {divisors(ranks)}, or 0 for all"
        )
    return world // model

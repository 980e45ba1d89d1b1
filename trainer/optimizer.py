"""AdamW with its decay mask, learning-rate schedules and clipping, from Optax."""

from typing import Any

import jax
import optax

from trainer.config import OptimizerConfig

NOT_DECAYED = ("scale", "bias", "attn_norm", "ffn_norm", "final_norm", "class_embed", "pos_embed")
"""Last names of the weights that weight decay leaves alone."""


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step (a skipped step counts, so that the rate depends on the step alone)."""
    final = config.peak_lr * config.final_lr_fraction
    warmup = optax.linear_schedule(0.0, config.peak_lr, config.warmup_steps)
    remaining = steps - config.warmup_steps
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.peak_lr, remaining, config.final_lr_fraction)
    elif config.schedule == "wsd":
        stable = optax.constant_schedule(config.peak_lr)
        decay = optax.linear_schedule(config.peak_lr, final, config.decay_steps)
        main = optax.join_schedules([stable, decay], [remaining - config.decay_steps])
    else:
        main = optax.constant_schedule(config.peak_lr)
    # Step 0 already learns: the warmup counts from one.
    return lambda step: optax.join_schedules([warmup, main], [config.warmup_steps])(step + 1)


def decay_mask(params: Any) -> Any:
    """True for the weights that decay: matrices, not norms, biases or position and class embeddings."""

    def decays(path: tuple, _: jax.Array) -> bool:
        return getattr(path[-1], "key", None) not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled decay (arXiv 1711.05101), before the learning rate, which the step multiplies in."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
    )

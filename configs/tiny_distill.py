"""A student in miniature of the teacher that configs/tiny_behemoth.py trains, which computes beside it.

    drover train --config configs/tiny_behemoth.py
    drover train --config configs/tiny_distill.py

Or the teacher speaks once, and is remembered:

    drover teach --config configs/tiny_distill.py --out runs/targets
    drover train --config configs/tiny_distill.py --config.distill.source=cache --config.distill.cache=runs/targets

Of each token the student learns 12 draws; --config.distill.draws=0 gives it the whole distribution of a teacher beside it.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from configs import tiny
from configs.tiny_behemoth import DATA
from trainer.config import CheckpointConfig, DistillConfig, EvalConfig, LogConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict

MODEL = replace(
    tiny.MODEL,
    hidden_size=96,
    num_heads=4,
    head_dim=24,
    dense_ffn_size=384,
    expert_ffn_size=192,
    num_experts=4,
    vision=replace(tiny.VISION, hidden_size=64, num_layers=2, num_heads=2, ffn_size=256, adapter_size=128),
)


def get_config() -> ConfigDict:
    return to_config_dict(
        RunConfig(
            name="tiny_distill",
            steps=400,
            model=MODEL,
            data=DATA,
            # At first the teacher shows more than the next token does; in the end the truth counts as much.
            distill=DistillConfig(
                teacher="runs/tiny_behemoth",
                teacher_dtype="float32",
                draws=12,
                soft_weight=0.8,
                final_soft_weight=0.5,
            ),
            optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=40),
            checkpoint=CheckpointConfig(every_steps=200),
            eval=EvalConfig(every_steps=100, questions=384),
            log=LogConfig(every_steps=5),
        )
    )

"""A teacher in miniature: the model of configs/tiny.py with twice the experts, more text, and twice as many steps.

    drover train --config configs/tiny_behemoth.py

configs/tiny_distill.py learns from it.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from configs.tiny import MODEL
from data.config import DataConfig
from trainer.config import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict

DATA = DataConfig(mixture={"text": 0.3, "scenes": 0.7}, sequence_length=512, batch_size=4, tokenizer_size=1024)
"""Of the teacher and of its students: both have to read the same tokens."""


def get_config() -> ConfigDict:
    return to_config_dict(
        RunConfig(
            name="tiny_behemoth",
            steps=2800,
            model=replace(MODEL, num_experts=16),
            data=DATA,
            optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=40),
            checkpoint=CheckpointConfig(every_steps=200),
            eval=EvalConfig(every_steps=100, questions=384),
            log=LogConfig(every_steps=5),
        )
    )

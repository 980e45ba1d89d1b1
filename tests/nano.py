"""A config file for tests of processes: text alone, experts, two layers; compiles in a few seconds."""

from typing import Any

from ml_collections import ConfigDict

from tests import micro


def get_config() -> ConfigDict:
    config: Any = micro.get_config()
    config.name = "nano"
    config.steps = 6
    config.model.vision = None
    config.model.hidden_size = 16
    config.model.expert_ffn_size = 8
    config.model.remat = "none"
    config.data.mixture = {"text": 1.0}
    config.data.batch_size = 8
    config.data.sequence_length = 128
    config.eval.every_steps = 6
    config.eval.questions = 0
    config.checkpoint.every_steps = 3
    return config

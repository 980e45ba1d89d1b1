"""Maverick learns from Behemoth on 4,096 devices: what the teacher said once, 12 draws of every token, is read from a cache.

    drover inspect --config configs/maverick_distill.py --devices 4096 --teacher-config configs/behemoth.py
    drover teach --config configs/maverick_distill.py --out caches/behemoth
    drover train --config configs/maverick_distill.py --workdir runs/maverick_distill

The sizes are those of configs/maverick.py and, of the teacher, configs/behemoth.py; a step has 8.4M tokens, twice that of
Maverick alone, so that every four devices (mesh.tensor) have a row.

This has never been run: the first command, which traces the whole step on a mesh of 4,096 devices, printed what follows. A
device holds 1.79 GB of weights, gradients and moments, 12.6 MB of the batch and its targets, and 1.52 GB of what is gathered
for the four layers of a super-block: 3.31 GB, which leaves 76.7 of 80 GB or 91.7 of 95 GB for activations. A step reads 131 MB
from the cache, which takes 6.56 TB for the 419B tokens of the run.

With --config.distill.source=mesh --config.distill.cache= the teacher computes beside the student: 1.01 GB of its weights in
bfloat16, and 5.87 GB gathered for a super-block, make it 10.2 GB. But its forward pass costs 5.47 times as much as the whole
step of the student, 84.5 % of the run; `drover teach` pays that once, 2.5e23 FLOP.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import maverick
from trainer.config import DistillConfig
from trainer.sections import to_config_dict


def get_config() -> ConfigDict:
    config: Any = maverick.get_config()
    config.name = "maverick_distill"
    config.steps = 50_000
    config.data.batch_size = 1024
    config.optimizer.warmup_steps = 1000
    config.mesh.update(fsdp=64, expert=16, tensor=4)
    config.distill = to_config_dict(
        DistillConfig(teacher="runs/behemoth", source="cache", cache="caches/behemoth", draws=12)
    )
    return config

"""Llama 4 Maverick, 17B active and 128 experts, in its released sizes (401.6B parameters, vision encoder included).

    drover train --config configs/maverick.py --workdir runs/maverick

Every second layer is a mixture of experts, the others are dense; no qk-norm and no rotary scaling, unlike Scout.

This has never been run: what follows is arithmetic. Weights, gradients and two Adam moments in float32 are 16 bytes a
parameter, 6.43 TB: 81 GPUs of 80 GB or 68 TPU v5p chips of 95 GB before any activation. A token of an 8,192-token row
costs about 109 GFLOP, as for Scout (a dense layer is as wide as a shared and a routed expert together). The 419B tokens
of this run are 4.6e22 FLOP: 5.2 days on 256 H100 at 40 % of their bfloat16 peak of 989 TFLOP/s.

The data is the embedded one (text of the standard library, drawn scenes) until data.paths names yours (docs/DATA.md). Its
tokenizer fills 32,768 of the 202,048 rows of the embedding table.
"""

from ml_collections import ConfigDict

from data.config import DataConfig
from model.config import ModelConfig, VisionConfig
from trainer.config import CheckpointConfig, EvalConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=202_048,
        hidden_size=5120,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        dense_ffn_size=16_384,
        expert_ffn_size=8192,
        num_experts=128,
        experts_per_token=1,
        moe_layer_step=2,
        nope_layer_step=4,
        chunk_size=8192,
        qk_norm=False,
        rope_theta=500_000.0,
        rope_scaling=None,
        temperature_floor=8192.0,
        temperature_scale=0.1,
        vision=VisionConfig(
            image_size=336,
            patch_size=14,
            hidden_size=1408,
            num_layers=34,
            num_heads=16,
            ffn_size=5632,
            shuffle=2,
            adapter_size=4096,
            rope_theta=10_000.0,
        ),
        dtype="bfloat16",
        remat="full",
    )
    # 4.2M tokens a step; a row has room for two images of the most tiles, 16 and a global one.
    data = DataConfig(sequence_length=8192, batch_size=512, tiles_per_row=34, max_tiles=16, tokenizer_size=32_768)
    return to_config_dict(
        RunConfig(
            name="maverick",
            steps=100_000,
            model=model,
            data=data,
            optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
            checkpoint=CheckpointConfig(every_steps=500, keep_last=2, keep_every=10_000),
            eval=EvalConfig(every_steps=1000),
        )
    )

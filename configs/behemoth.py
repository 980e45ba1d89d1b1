"""A model with Llama 4 Behemoth's published totals: 288B active parameters, 16 experts, nearly two trillion in all.

    drover train --config configs/behemoth.py --workdir runs/behemoth

Meta published neither its depth nor its width. The sizes here are synthetic: Scout's shape (every layer a mixture of
experts) scaled until the totals fit, 1,991.7B text parameters, of which 288.5B are active. The vision encoder is that
of Scout.

This has never been run: what follows is arithmetic. Weights, gradients and two Adam moments in float32 are 16 bytes a
parameter, 31.9 TB: 399 GPUs of 80 GB or 336 TPU v5p chips of 95 GB before any activation. A token of an 8,192-token row
costs about 1,788 GFLOP (6 x 285.2B active parameters without the embedding table, and 77 GFLOP of attention). The 419B
tokens of this run are 7.5e23 FLOP: 5.4 days on 4,096 H100 at 40 % of their bfloat16 peak of 989 TFLOP/s.

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
        hidden_size=16_384,
        num_layers=96,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        dense_ffn_size=48_128,  # of no layer here: all are mixtures
        expert_ffn_size=24_064,
        num_experts=16,
        experts_per_token=1,
        moe_layer_step=1,
        nope_layer_step=4,
        chunk_size=8192,
        qk_norm=True,
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
            name="behemoth",
            steps=100_000,
            model=model,
            data=data,
            optimizer=OptimizerConfig(peak_lr=1e-4, warmup_steps=2000),
            checkpoint=CheckpointConfig(every_steps=500, keep_last=2, keep_every=10_000),
            eval=EvalConfig(every_steps=1000),
        )
    )

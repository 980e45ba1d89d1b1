"""Text, pictures, video and sound in one run, in miniature; meant for a laptop and a quarter of an hour.

    drover train --config configs/tiny_av.py

The model of configs/tiny.py with an audio encoder beside its vision encoder. Text, drawn scenes, clips of a shape that
moves one of eight ways, and two to four digits as tones, made on the spot.

Not yet run whole on an idle machine, so no time and no scores of it are given. What was measured, with shorter runs of this
config on other mixtures: clips and tones alone (0.65 and 0.35 of the tokens), 500 steps, held-out questions answered right
for combinations that training shows / never shows, with another question's file, and by the best guess:

    digits    98 % / 94 %   shuffled 0 %   chance  2 %
    digit     94 % / 94 %   shuffled 3 %   chance 11 %

Which way a shape moves was not learned in runs of 300 to 700 steps on clips alone: 16 to 19 % right for combinations that
training shows, 1 to 8 % for those that it never shows (of which it has learned that they do not occur), chance 14 %.
"""

from ml_collections import ConfigDict

from data.config import DataConfig
from model.config import AudioConfig, ModelConfig, VisionConfig
from trainer.config import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict


def get_config() -> ConfigDict:
    # A patch of 12 pixels and a shuffle of 2 make each quarter of the picture one token, as the scenes are laid out.
    vision = VisionConfig(
        image_size=48, patch_size=12, hidden_size=128, num_layers=3, num_heads=4, ffn_size=512, adapter_size=256
    )
    # One window of 1.28 s, 16 tokens, holds a sound whole.
    audio = AudioConfig(mel_bins=48, window_frames=128, hidden_size=96, num_layers=2, num_heads=4, ffn_size=384)
    model = ModelConfig(
        vocab_size=1024,
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        dense_ffn_size=768,
        expert_ffn_size=384,
        num_experts=8,
        chunk_size=128,
        rope_theta=10000.0,
        temperature_floor=128.0,
        init_std=0.0,
        vision=vision,
        audio=audio,
    )
    return to_config_dict(
        RunConfig(
            name="tiny_av",
            steps=2000,
            model=model,
            data=DataConfig(
                mixture={"text": 0.15, "scenes": 0.3, "clips": 0.35, "tones": 0.2},
                sequence_length=512,
                batch_size=4,
                tiles_per_row=16,
                windows_per_row=8,
                tokenizer_size=1024,
                scenes=16384,
            ),
            optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=40),
            checkpoint=CheckpointConfig(every_steps=200),
            eval=EvalConfig(every_steps=100, questions=256),
            log=LogConfig(every_steps=5),
        )
    )

"""Text, pictures, video and sound in one run, in miniature; meant for a laptop and ten minutes.

    drover train --config configs/tiny_av.py

The model of configs/tiny.py with an audio encoder beside its vision encoder. Text, drawn scenes, clips of a shape that
moves one of eight ways, and two to four digits as tones, made on the spot.

Last run alone on two cores of a shared AMD EPYC (Python 3.11.2, jax 0.10.2, float32): 9:17 minutes. Other hours there are up to
half as fast. Held-out questions answered right after 1200 steps, for combinations that training shows / never shows, with
another question's file, and by the best guess:

    motion    100 % / 100 %   shuffled 12 %   chance 18 %
    digit     100 % / 100 %   shuffled  4 %   chance 11 %
    digits    100 % /  97 %   shuffled  0 %   chance  2 %

Motion is learned all of a sudden, once the model sees where in a frame things are. With a little text and few scenes among the
clips from the start, the same seed was at 48 % / 34 % for motion after 1200 steps.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from configs.tiny import MODEL
from data.config import DataConfig
from model.config import AudioConfig
from trainer.config import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict

# One window of 1.28 s, 16 tokens, holds a sound whole.
AUDIO = AudioConfig(mel_bins=48, window_frames=128, hidden_size=96, num_layers=2, num_heads=4, ffn_size=384)


def get_config() -> ConfigDict:
    return to_config_dict(
        RunConfig(
            name="tiny_av",
            steps=1200,
            model=replace(MODEL, audio=AUDIO),
            data=DataConfig(
                # Clips first: where things are is learned all of a sudden, and sooner from batches full of them. A little text
                # among them, with a loss ten times theirs, is most of the gradient.
                mixture={"text": 0.0, "scenes": 0.0, "clips": 0.9, "tones": 0.1},
                curriculum={"600": {"text": 0.1, "scenes": 0.2, "clips": 0.3, "tones": 0.4}},
                sequence_length=512,
                batch_size=4,
                tiles_per_row=16,
                windows_per_row=8,
                tokenizer_size=1024,
                scenes=16384,
                clips=8192,
                tones=8192,
            ),
            optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=40),
            checkpoint=CheckpointConfig(every_steps=200),
            eval=EvalConfig(every_steps=100, questions=256),
            log=LogConfig(every_steps=5),
        )
    )

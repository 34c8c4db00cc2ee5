"""Train the small tokenizer of the nano models on synthetic robot instructions, and write it into the package.

    python scripts/train_tokenizer.py [output]

It has PaliGemma's special tokens (pad 0, EOS 1, BOS 2, unknown 3), single digits, a newline token, and bytes for
everything that the 512 tokens lack, so that any text can be encoded. Text and training are deterministic.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

OUTPUT = Path(__file__).parents[1] / "src/acrlpd/data/assets/nano_tokenizer.model"
VOCAB_SIZE = 512

VERBS = ("pick up", "grasp", "lift", "push", "pull", "slide", "rotate", "move", "take", "hold", "touch", "reach for")
COLORS = ("", "red", "green", "blue", "yellow", "black", "white", "orange", "purple", "small", "large")
THINGS = (
    "cube", "block", "ball", "bowl", "plate", "mug", "cup", "bottle", "can", "box", "towel", "pen", "peg", "spoon",
    "book", "banana", "apple", "carrot", "puck", "marker", "cloth", "screwdriver",
)  # fmt: skip
PLACES = (
    "the table", "the drawer", "the shelf", "the tray", "the basket", "the sink", "the stove", "the bin", "the cabinet",
    "the left side", "the right side", "the goal position", "the middle of the table",
)  # fmt: skip
FIXED = (
    "open the drawer", "close the drawer", "open the door", "close the door", "open the window", "close the window",
    "turn on the stove", "turn off the stove", "press the button", "turn the dial", "pull the lever", "do nothing",
    "push the lever down", "insert the peg into the socket", "transfer the cube to the other arm", "transfer cube",
    "fold the towel in half", "wipe the table with the cloth", "hammer the nail", "assemble the ring",
    "stack the blocks", "pour water into the cup", "lift the cube", "reach the goal", "solve the puzzle",
    "play with the scene", "unplug the charger", "pick-place", "peg-insert-side", "button-press", "cube-single",
)  # fmt: skip


def sentences() -> Iterator[str]:
    """Yield instructions as people write them, and the same in pi0.5's text with state numbers."""
    texts = [*FIXED]
    for i, (verb, color, thing) in enumerate(itertools.product(VERBS, COLORS, THINGS)):
        named = " ".join(filter(None, (verb, "the", color, thing)))
        place = PLACES[i % len(PLACES)]
        texts += [named, f"{named} and place it on {place}", f"put the {thing} into {place}"]
    for i, text in enumerate(texts):
        yield text
        yield text.capitalize() + "."
        state = " ".join(str((37 * i + 11 * k * k) % 256) for k in range(4))
        yield f"Task: {text}, State: {state};\nAction: "


def train() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["\n"],
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(train())
    print(f"wrote {output.stat().st_size} bytes to {output}")


if __name__ == "__main__":
    main()

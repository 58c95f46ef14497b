"""The two ways to write a text: a checkpoint by our engine, and a Hugging Face folder by transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import CheckpointError, DataError, EnvironmentProblem
from megatron_davinci.evaluate.endings import ends, stopper
from megatron_davinci.evaluate.engine import Engine
from megatron_davinci.evaluate.sampling import Draw
from megatron_davinci.evaluate.serving.forms import Forms, chooser
from megatron_davinci.evaluate.serving.requests import Asked

Told = Callable[[int, int], None]


class Writer(Protocol):
    """A model that writes texts.

    Attributes:
        tokenizer: Its tokenizer.
        longest: Tokens of its context.
        forms: That answers may be made to have.
    """

    tokenizer: Tokenizer
    longest: int
    forms: Forms

    def write(self, asked: Sequence[Asked], told: Told | None = None) -> list[list[int]]:
        """The tokens that follow each prompt, its end included; a negative one ends those that could not go on.

        Args:
            asked: The texts.
            told: Is given each text's number with each of its tokens, as they are chosen.

        Returns:
            Token ids; -1 at the end where a logit was not a number, `forms.UNFIT` where a form was too complex.
        """
        ...


class CheckpointWriter:
    """A checkpoint, as `davinci eval` computes it.

    Args:
        engine: With the model.
        tokenizer: The model's.
        longest: Tokens of the model's context.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, longest: int) -> None:
        self._engine, self.tokenizer, self.longest = engine, tokenizer, longest
        self.forms = Forms(tokenizer)

    def write(self, asked: Sequence[Asked], told: Told | None = None) -> list[list[int]]:
        """As `Writer.write`."""
        return self._engine.generate(
            [one.ids for one in asked],
            stopper(self.tokenizer, [one.until for one in asked]),
            [one.most for one in asked],
            choose=chooser(asked, self.forms, told),
        )


class FolderWriter:
    """A model in a folder of Hugging Face's form, one of our exports for instance.

    Args:
        folder: With `config.json`, weights in safetensors and `tokenizer.json`.
        device: Of torch.
        dtype: Of the weights in memory.

    Raises:
        CheckpointError: The folder is not such a model, or lacks some of its weights. None is downloaded, and no
            code of it is run.
        EnvironmentProblem: transformers is not installed.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise EnvironmentProblem(
                "transformers is not installed.",
                where="davinci serve",
                do="pip install 'megatron-davinci[eval]'",
            ) from None
        self.tokenizer = Tokenizer.load(folder)
        self.forms = Forms(self.tokenizer)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # its own, those of safetensors, and whatever a config.json brings about
            raise CheckpointError(
                "A folder's model cannot be loaded by transformers.",
                where=folder,
                found=f"{type(error).__name__}: {error}"[:600],
                expected="config.json and model.safetensors of a causal language model",
                do="export a checkpoint with `davinci convert to-hf`, or name a run",
            ) from error
        if missing := sorted(found["missing_keys"]):
            # transformers draws them at random, and says so in its log only.
            raise CheckpointError(
                "A folder lacks weights of its model.",
                where=folder,
                found=f"no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" * (len(missing) > 3)),
                expected="all weights of the model that config.json describes",
                do="bring the whole folder, or export the checkpoint again with `davinci convert to-hf`",
            )
        self._model: Any = model.eval().to(device)
        self._device = device
        longest = getattr(model.config, "max_position_embeddings", None)
        if not isinstance(longest, int):
            raise DataError(
                "A model does not say how long its context is.",
                where=folder / "config.json",
                found="no max_position_embeddings",
                expected="a number of tokens",
            )
        self.longest = longest
        if self.tokenizer.vocab_size > model.config.vocab_size:
            raise DataError(
                "The folder's tokenizer has more tokens than its model.",
                where=folder,
                found=f"{self.tokenizer.vocab_size:,} tokens",
                expected=f"at most {model.config.vocab_size:,}",
            )

    @torch.inference_mode()
    def write(self, asked: Sequence[Asked], told: Told | None = None) -> list[list[int]]:
        """As `Writer.write`: prompts padded on the left, keys and values kept, texts that have ended left out."""
        from transformers import DynamicCache

        draw = chooser(asked, self.forms, told) or Draw([one.sampling for one in asked])
        written = [list[int]() for _ in asked]
        columns = max(len(one.ids) for one in asked)
        rows = [[0] * (columns - len(one.ids)) + one.ids for one in asked]
        ids = torch.tensor(rows, device=self._device)
        before = torch.tensor([columns - len(one.ids) for one in asked], device=self._device)
        mask = torch.arange(columns, device=self._device) >= before[:, None]
        positions = (torch.arange(columns, device=self._device) - before[:, None]).clamp(min=0)
        cache, alive = DynamicCache(), list(range(len(asked)))
        while True:
            out = self._model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen = draw(alive, out.logits[:, -1]).tolist()
            going = []
            for row, (number, token) in enumerate(zip(alive, chosen, strict=True)):
                so_far, one = written[number], asked[number]
                so_far.append(token)
                if token >= 0 and len(so_far) < one.most and not ends(self.tokenizer, so_far, one.until):
                    going.append(row)
            if not going:
                return written
            kept = torch.tensor(going, device=self._device)
            if len(going) < len(alive):
                cache.batch_select_indices(kept)
            alive = [alive[row] for row in going]
            ids = torch.tensor([[written[number][-1]] for number in alive], device=self._device)
            mask = torch.cat([mask[kept], mask.new_ones(len(alive), 1)], 1)
            positions = positions[kept, -1:] + 1

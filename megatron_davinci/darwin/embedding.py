"""A classifier of texts by an encoder's embeddings: mean of the last hidden states, softmax regression upon it.

FineWeb-Edu's way (Penedo and others 2024, section 3.4), with any encoder, or decoder, of transformers in a local
folder. The encoder stays as it is; the head is fitted by L-BFGS to the minimum of a convex loss, so nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_davinci.darwin.linear import Floats, softmax
from megatron_davinci.darwin.sketches import save
from megatron_davinci.errors import DataError, EnvironmentProblem
from megatron_davinci.files import disk_errors, file_digest, write_json

KIND = "embedding"
_BATCH = 16  # texts
_FILES = ("embedding.weights.npy", "embedding.bias.npy")


class Encoder:
    """A model that makes a vector of a text.

    Args:
        folder: Of `config.json`, weights as safetensors, and a tokenizer.
        tokens: Of a text that are looked at.

    Raises:
        DataError: There is no such model in the folder.
        EnvironmentProblem: transformers is not installed.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise EnvironmentProblem(
                "Embeddings need transformers.",
                found=error,
                do="pip install 'megatron-davinci[eval]'",
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            self._model = AutoModel.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, use_safetensors=True,
                dtype="float32",
            ).eval()  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                "There is no encoder that transformers can load.",
                where=folder,
                found=str(error).splitlines()[0] if str(error) else type(error).__name__,
                expected="a local folder with config.json, weights as safetensors and a tokenizer",
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        # Positions count from the left, so what is padded there would be another text than the same one alone.
        self._tokenizer.padding_side = "right"
        longest = getattr(self._model.config, "max_position_embeddings", None) or tokens
        self._tokens = min(tokens, longest)
        self._model.requires_grad_(False)

    def vectors(self, texts: Sequence[str]) -> Floats:
        """The mean of a text's last hidden states, scaled to length 1: float64 [texts, hidden size].

        A text without a token (an empty one, where the tokenizer adds none) has zeros.
        """
        found = []
        for first in range(0, len(texts), _BATCH):
            batch = self._tokenizer(
                list(texts[first : first + _BATCH]), padding=True, truncation=True,
                max_length=self._tokens, return_tensors="pt",
            )  # fmt: skip
            mask = batch["attention_mask"]
            kept = mask.numpy()[:, :, None].astype(np.float64)
            if not mask.shape[1]:
                found.append(np.zeros((len(mask), self._model.config.get_text_config().hidden_size)))
                continue
            mask[mask.sum(1) == 0] = 1  # attention to nothing at all would be NaN
            states = self._model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.numpy()
            mean = (states * kept).sum(1) / np.maximum(kept.sum(1), 1)
            found.append(mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12))
        return np.concatenate(found) if found else np.zeros((0, 0))


@dataclass(frozen=True)
class EmbeddingClassifier:
    """A trained classifier.

    Attributes:
        labels: Its labels, in the order of its probabilities.
        weights: float64 [labels, hidden size].
        bias: float64 [labels].
        encoder: Folder of the encoder.
        digests: SHA-256 of the encoder's files.
        tokens: Of a text that are looked at.
        facts: What it was trained on, and how well it did on held-out data.
        name: `embedding`, and the digest of its weights.
    """

    labels: tuple[str, ...]
    weights: Floats
    bias: Floats
    encoder: Path
    digests: dict[str, str]
    tokens: int
    facts: dict[str, Any]
    name: str = KIND

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.encoder, self.tokens)

    def probabilities(self, text: str) -> Floats:
        """The probability of each label, float64 [labels]."""
        [vector] = self._encoder.vectors([text])
        return softmax(self.weights @ vector + self.bias)

    def save(self, folder: Path) -> None:
        """Write the head, then `classifier.json`, which makes the folder one; the encoder stays where it is.

        Raises:
            EnvironmentProblem: The disk refused.
        """
        with disk_errors(folder, "making a classifier's folder"):
            folder.mkdir(parents=True, exist_ok=True)
        save(folder / "embedding", weights=self.weights, bias=self.bias)
        content = {
            "kind": KIND,
            "labels": self.labels,
            "encoder": str(self.encoder.absolute()),
            "encoder_sha256": self.digests,
            "tokens": self.tokens,
            "sha256": {name: file_digest(folder / name) for name in _FILES},
        }
        write_json(folder / "classifier.json", content | {"trained": self.facts})

    @classmethod
    def load(cls, folder: Path, described: dict[str, Any]) -> EmbeddingClassifier:
        """Open a classifier.

        Args:
            folder: Where it lies.
            described: Its `classifier.json`.

        Raises:
            DataError: A file of it, or of its encoder, is missing, damaged or another one.
        """
        encoder = Path(described["encoder"])
        for place, digests in ((folder, described["sha256"]), (encoder, described["encoder_sha256"])):
            for name, digest in digests.items():
                if not (place / name).is_file() or file_digest(place / name) != digest:
                    raise DataError(
                        "A file of a classifier or of its encoder is missing, damaged or another one.",
                        where=place / name,
                        expected=f"SHA-256 {digest}",
                        do="copy it again, or train the classifier anew",
                    )
        weights, bias = (np.load(folder / name, allow_pickle=False) for name in _FILES)
        return cls(
            tuple(described["labels"]), weights, bias, encoder, described["encoder_sha256"],
            described["tokens"], described["trained"], f"{KIND} {described['sha256'][_FILES[0]][:12]}",
        )  # fmt: skip


def train(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    encoder: Path,
    tokens: int = 512,
    penalty: float = 1e-4,
) -> EmbeddingClassifier:
    """Fit a classifier.

    Args:
        texts: At least one of each label.
        labels: Of each text.
        encoder: Folder of the encoder.
        tokens: Of a text that are looked at.
        penalty: Of the squared weights.

    Returns:
        The classifier, without facts.
    """
    from scipy.optimize import minimize

    vectors = Encoder(encoder, tokens).vectors(texts)
    names = tuple(sorted(set(labels)))
    wanted = np.array([names.index(label) for label in labels])
    # Each label counts alike, however many texts it has.
    weight = 1 / (len(names) * np.bincount(wanted, minlength=len(names)).astype(np.float64)[wanted])
    # Every dimension has the spread 1 while the head is fitted, so that the penalty is fair to all.
    centre, spread = vectors.mean(0), vectors.std(0) + 1e-9
    rows = (vectors - centre) / spread
    shape = (len(names), rows.shape[1] + 1)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)

    def loss(flat: Floats) -> tuple[float, Floats]:
        head = flat.reshape(shape)
        logits = rows @ head.T
        logits -= logits.max(1, keepdims=True)
        totals = np.log(np.exp(logits).sum(1))
        nats = totals - logits[np.arange(len(rows)), wanted]
        error = np.exp(logits - totals[:, None])
        error[np.arange(len(rows)), wanted] -= 1
        slope = (error * weight[:, None]).T @ rows
        slope[:, :-1] += 2 * penalty * head[:, :-1]
        return float(weight @ nats + penalty * (head[:, :-1] ** 2).sum()), slope.ravel()

    head = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B").x.reshape(shape)
    weights = head[:, :-1] / spread
    bias = head[:, -1] - weights @ centre
    digests = {
        path.name: file_digest(path)
        for path in sorted(encoder.iterdir())
        if path.suffix in (".json", ".safetensors", ".model", ".txt") and path.is_file()
    }
    return EmbeddingClassifier(names, weights, bias, encoder, digests, tokens, {})

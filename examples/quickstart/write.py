"""A few lines of the trained model, for the page. They are what four million parameters write after minutes."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_davinci.config import RunConfig
from megatron_davinci.files import write_json

PROMPTS = {
    "general": "This package provides",
    "code": "def read_lines(path):\n    ",
    "science": "numpy.linalg.norm\n\nThe norm of a vector is",
    "qa": "Question: What does `str.split` return?\nAnswer:",
}


def write_samples(exported: Path, config: RunConfig, out: Path, new_tokens: int = 80) -> None:
    """Load the export with plain transformers and let it continue a prompt of each domain.

    Args:
        exported: The exported folder.
        config: The run's configuration; its seed keys the sampling.
        out: The JSON file to write.
        new_tokens: Tokens a sample.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    samples = []
    for domain, prompt in PROMPTS.items():
        torch.manual_seed(config.run.seed)
        tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        written = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
        )[0, tokens["input_ids"].shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        samples.append({"domain": domain, "prompt": prompt, "text": text})
    write_json(out, samples)

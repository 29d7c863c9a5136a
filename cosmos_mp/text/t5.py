"""The encoder of T5 (google-t5/t5-11b, v1.0): the text that Cosmos-Transfer1 was trained on. Local files only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_mp.text import check_captions

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "spiece.model")
HUB = "google-t5/t5-11b"


class T5Text(nn.Module):
    """Last hidden states of T5's encoder, zeros beyond the caption's length. It runs on the device it is moved to.

    Args:
        folder: a local copy of the Hugging Face folder.
        tokens: longer captions are truncated; the end token is kept.
        dim: width that the network expects, T5's d_model.
        dtype: of weights and computing; bfloat16 halves the memory. The result is float32.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: another kind of model, another width, or weights that do not fit.
    """

    def __init__(self, folder: Path, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        from transformers import T5Config, T5EncoderModel, T5TokenizerFast

        super().__init__()
        self.tokens, self.dim = tokens, dim
        folder = Path(folder)
        _check_files(folder)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype} for T5: take float32 or bfloat16 (float16 overflows in its feed-forward layers)")
        kind = T5Config.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if kind != "t5":
            raise ValueError(f"{folder}/config.json: model_type {kind!r}, expected t5; point text.path at a copy of {HUB}")
        config = T5Config.from_pretrained(folder, local_files_only=True)
        if config.d_model != dim:
            raise ValueError(
                f"{folder} has d_model={config.d_model}, but text.dim={dim}; {HUB} has 1024 (t5-v1_1-xxl is another model): "
                "point text.path at the right folder or set text.dim and net.text_dim"
            )
        try:
            self.tokenizer = T5TokenizerFast.from_pretrained(folder, local_files_only=True)
            self.model, report = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
        except Exception as error:
            raise ValueError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); fetch {HUB} again") from error
        # The folder holds the decoder too; nothing else may be left over.
        report["unexpected_keys"] = [name for name in report["unexpected_keys"] if not name.startswith(("decoder.", "lm_head."))]
        complaints = [f"{key.replace('_', ' ')}: {', '.join(map(str, sorted(names)[:5]))}" for key, names in report.items() if names]
        if complaints:
            raise ValueError(f"{folder}: weights do not fit T5's encoder ({'; '.join(complaints)}); fetch {HUB} again")
        if self.tokenizer("").input_ids != [config.eos_token_id]:
            raise ValueError(f"{folder}: the tokenizer does not close a caption with T5's end token; fetch the tokenizer of {HUB} again")
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """float32 (B, tokens, dim) on the CPU. An empty caption is T5's answer to its end token alone, not zeros."""
        check_captions(captions)
        # Padding to the longest caption is enough: attention never looks at padded keys.
        batch = self.tokenizer(list(captions), padding="longest", truncation=True, max_length=self.tokens, return_tensors="pt")
        mask = batch.attention_mask.to(self.model.device)
        hidden = self.model(input_ids=batch.input_ids.to(self.model.device), attention_mask=mask).last_hidden_state
        hidden = hidden.float().masked_fill(mask[..., None] == 0, 0.0).cpu()
        return nn.functional.pad(hidden, (0, 0, 0, self.tokens - hidden.shape[1]))

    def null(self, batch: int) -> Tensor:
        """Zeros (B, tokens, dim)."""
        return torch.zeros(batch, self.tokens, self.dim)


def _check_files(folder: Path) -> None:
    remedy = f"fetch {HUB} into it, point text.path at a local copy, or use cached embeddings (text.kind=cached)"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder for the T5 text encoder; {remedy}")
    for what, names in (("configuration", ("config.json",)), ("weights", WEIGHTS), ("tokenizer", TOKENIZERS)):
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(f"{folder}: no {what} of T5 ({' or '.join(names)}); {remedy}")

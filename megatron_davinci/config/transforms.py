"""What happens to a stage's samples between the data and the model."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class Transforms(Section):
    """What happens to a stage's samples."""

    document_mask: bool = Field(
        default=False,
        description="Attention stays inside a document, and no label is in another document than its input",
    )
    reset_positions: bool = Field(
        default=False, description="With document_mask: positions begin at 0 in every document"
    )

    @model_validator(mode="after")
    def _positions_restart_where_attention_does(self) -> Transforms:
        if self.reset_positions and not self.document_mask:
            # Tokens of two documents would have distances that mean nothing.
            raise ValueError("reset_positions: true needs document_mask: true")
        return self

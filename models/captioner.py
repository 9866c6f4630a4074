"""CoCa's captioner (Yu et al., arXiv 2205.01917): the text tower is the unimodal half of the decoder, this the other.

Its blocks continue the text tower's stream and also attend to the image tokens. The output table is the text tower's
token table, unless the spec asks for one of its own, as open_clip's CoCa has it.
"""

from __future__ import annotations

from torch import nn

from .output import TowerOutput
from .spec import ModelSpec
from .transformer import BlockOutput, TokenStream, Transformer, in_autocast


class Captioner(nn.Module):
    """Cross-attending blocks: from text tokens and image tokens to states that predict the next token."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.captioner is not None
        after = spec.captioner.cross_attention == "after"
        self.transformer = Transformer(spec.text, spec.captioner.depth, spec.memory_width, after)
        own = not spec.captioner.tied_embeddings
        self.output = nn.Linear(spec.text.width, spec.text.vocabulary, bias=False) if own else None

    def forward(self, image: TowerOutput, text: TowerOutput) -> BlockOutput:
        """States [t, d] in the text tower's layout; multiplied with the output table they are next-token logits.

        Under autocast they have its dtype, which says in what precision they are to be multiplied.
        """
        stream, memory = TokenStream(text.tokens, text.layout), TokenStream(image.tokens, image.layout)
        states_td, routing = self.transformer(stream, memory)
        return BlockOutput(in_autocast(states_td), routing)

"""Torch's varlen kernel computes the documents that the pieces describe."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# Run in a process of its own, so that torch meets CUDA there. Prints, for each case, the largest difference of output
# and gradients between the kernel in bf16 and the pieces one by one in fp32, relative to the largest value; whether
# the kernel was taken; and how much a document's output moved when another's keys and values were changed.
PROGRAM = """
import json
import numpy as np, torch
from megatron.core.transformer.enums import AttnMaskType
from megatron_davinci.model import attention
from megatron_davinci.model.context_parallel import SequencePart
from megatron_davinci.model.documents import Documents
from tests.model.test_layers import a_config

class Group:
    def __init__(self, part): self.part = part
    def size(self): return self.part.ranks
    def rank(self): return self.part.rank

LENGTH, HEADS, GROUPS, CHANNELS = 512, 8, 2, 64
ends = np.zeros((2, LENGTH), bool)
ends[0, [4, 5, 130, 300, 301, 420]] = ends[1, [255, 256]] = True
answers = []
for ranks, rank in ((1, 0), (2, 0), (2, 1)):
    part = SequencePart(LENGTH, ranks, rank)
    documents = Documents.of(ends, part, torch.device("cuda"))
    config = a_config(num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=CHANNELS)
    attend = attention.SDPAttention(config, 1, AttnMaskType.causal, "self").eval()
    parts = [SequencePart(LENGTH, ranks, r) for r in range(ranks)]
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = ((LENGTH, 2, HEADS, CHANNELS), *[(LENGTH, 2, GROUPS, CHANNELS)] * 2)
    whole = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    weight = torch.randn(LENGTH // ranks, 2, HEADS * CHANNELS, generator=generator, device="cuda")

    def run(q, k, v):
        if ranks > 1:
            attend.context_group = Group(part)
            both = torch.cat([torch.cat([p.take(x, 0) for p in parts]) for x in (k, v)], dim=2)
            attention.gather_sequence = lambda part, group: both
        return attend(*(part.take(x, 0) for x in (q, k, v)), None, packed_seq_params=documents)

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        taken = attention.varlen_kernel(torch.empty(1, dtype=dtype, device="cuda"), 0.0) is not None
        assert taken == (dtype == torch.bfloat16)
        tensors = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in whole]
        out = run(*tensors)
        (out * weight).sum().backward()
        found[dtype] = [out.detach().float(), *(x.grad.float() for x in tensors)]
    difference = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found[torch.bfloat16], found[torch.float32])
    )
    q, k, v = (x.to(torch.bfloat16) for x in whole)
    k2, v2 = k.clone(), v.clone()
    k2[6:131, 0] += 1
    v2[6:131, 0] += 1
    with torch.no_grad():
        moved = (run(q, k2, v2) - run(q, k, v)).float().abs().amax(-1)
    here = part.take(torch.arange(LENGTH), 0)
    changed = ((here >= 6) & (here < 131)).cuda()
    elsewhere, other_row, inside = (float(x.max()) for x in (moved[~changed], moved[:, 1], moved[changed, 0]))
    answers.append([difference, elsewhere, other_row, inside])
print(json.dumps(answers))
"""


def test_documents_by_the_varlen_kernel():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == 3
    for difference, elsewhere, other_row, inside in answers:
        assert difference < 2e-2
        assert elsewhere == other_row == 0.0
        assert inside > 0.1

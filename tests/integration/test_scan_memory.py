"""A scan in too little memory: a real limit on the process, which the allocator runs into."""

import json
import subprocess
import sys

import numpy as np

# Measures one cell with a generous budget, then again under a limit on the address space that the budget breaks.
PROGRAM = """
import json, logging, resource, sys
import numpy as np
import torch
from corpus.reader import Cells
from evaluate.perturb import plan_edits
from evaluate.perturb_settings import PerturbationSettings
from evaluate.scan_compute import Scanner
from train.model import MaskedLM
from train.presets import ModelSettings

logging.basicConfig(stream=sys.stderr)
torch.manual_seed(0)
torch.set_num_threads(1)
config = ModelSettings(preset="tiny", hidden_size=128, feed_forward_size=256).bert_config(500)
net, length = MaskedLM(config), 150
tokens = np.arange(4, 4 + length)
cells = Cells(np.arange(1), np.array([0, length]), tokens.astype(np.uint16))
edits, _ = plan_edits(tokens, None, tokens[:, None], PerturbationSettings(), np.ones(500), 512)

def scan(budget):
    scanner = Scanner(net.bert, max_length=512, special_tokens="none", num_layers=2, token_budget=budget)
    return scanner.scan(cells, [edits], np.ones((1, 128))).shifts[:, 0].tolist(), scanner.token_budget

expected, _ = scan(2_000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, -1))
found, budget = scan(30_000)
print(json.dumps({"expected": expected, "found": found, "budget": budget}))
"""


def test_backs_off_when_the_process_may_have_no_more_memory(repository):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=repository, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    assert facts["budget"] < 30_000
    assert "out of memory: micro-batches of at most" in done.stderr
    np.testing.assert_allclose(facts["found"], facts["expected"], atol=1e-7, rtol=0)

import json
import os
import platform

import torch
import transformers

import attnshape
from attnshape.bench.machine import in_words, machine_facts, run_facts


def test_facts_name_the_machine_and_nobody() -> None:
    facts = machine_facts(torch.device("cpu"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts["kind"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert platform.node() not in json.dumps(facts)
    assert f"torch {torch.__version__}" in in_words(facts)


def test_a_training_runs_facts_name_what_its_figures_depend_on() -> None:
    facts = run_facts()
    assert facts["versions"] == {
        "attnshape": attnshape.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert facts["machine"]["processor"] == machine_facts(torch.device("cpu"))["device"]
    assert facts["machine"]["cpus"] == os.cpu_count()
    assert platform.node() not in json.dumps(facts)

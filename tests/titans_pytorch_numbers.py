"""Reference numbers of titans-pytorch: `python tests/titans_pytorch_numbers.py` writes them.

Needs the package (extra `parity`); the tests read what it wrote.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "titans_pytorch.npz"
CASES = {  # name -> (options of NeuralMemory, tokens)
    "whole": ({"chunk_size": 4}, 18),
    "batched": ({"chunk_size": 4, "batch_size": 8}, 24),
    "heads": ({"chunk_size": 2, "batch_size": 4, "heads": 2, "dim_head": 4}, 13),
    "linear": ({"chunk_size": 3, "momentum": False, "default_model_kwargs": {"depth": 1}}, 9),
}
DIM = 8


def main() -> None:
    """Run the cases and keep parameters, inputs, outputs and the gradient of sum(sin(output))."""
    import torch
    from titans_pytorch import NeuralMemory

    out = {}
    for name, (options, tokens) in CASES.items():
        torch.manual_seed(0)
        memory = NeuralMemory(DIM, **options)
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.data = parameter + 0.1 * torch.randn(parameter.shape)
        x = torch.randn(2, tokens, DIM, requires_grad=True)
        y, state = memory(x)
        torch.sin(y).sum().backward()
        weights, _ = state.states
        keep = {"x": x, "y": y, "dx": x.grad}
        keep |= {f"weights/{n}": w for n, w in weights.items()}
        keep |= {f"param/{n}": w for n, w in memory.state_dict().items() if n != "zero"}
        out |= {f"{name}/{n}": w.detach().numpy() for n, w in keep.items()}
    np.savez_compressed(FILE, **out)


if __name__ == "__main__":
    main()

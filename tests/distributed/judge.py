"""What transformers says of a response: the independent side of the distributed tests."""

import torch


def sequence_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs (len(response),) of the response's tokens after the prompt, one plain forward."""
    ids = torch.tensor([prompt + response])
    logps = model(ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]

"""Which tokens of a batch row a step gives to which request."""

from __future__ import annotations

import numpy as np

from kvtrace_recorder.messages import Sequenced
from kvtrace_recorder.session.inputs import StepInputs
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.requests import Bools, CacheEntry, RequestState


def sequenced(
    row: int, state: RequestState, count: int, inputs: StepInputs, prompts: list[int] | None
) -> Sequenced:
    """A request's share of a step.

    Parameters
    ----------
    row : int
        Row of the batch.
    state : RequestState
        The request before the step.
    count : int
        Tokens of the step, padding not counted.
    inputs : StepInputs
        What the model was given.
    prompts : list of int or None
        Tokens of every row's prompt, where prompts come in chunks.
    """
    known = prompts[row] if prompts is not None and len(prompts) == inputs.batch else 0
    prompt = state.prompt_tokens or known or count - inputs.num_candidates
    new = not state.is_known
    return Sequenced(
        state.request,
        row,
        state.tokens,
        count,
        new,
        prompt,
        state.external_id,
        encoder_request=state.encoder,
    )


def fillers(model: ModelState, entry: CacheEntry, inputs: StepInputs) -> Bools:
    """[batch, 1]: rows of a batch that have ended and are fed padding until the others end."""
    ends, fills = model.end_tokens
    found = np.zeros((inputs.batch, 1), bool)
    if inputs.token_ids is None or inputs.batch == 1 or inputs.length > 1:
        return found
    for row, state in enumerate(entry.requests[: inputs.batch]):
        # A prompt may end like a sequence: BART's decoder begins with the end token.
        ended = state.last_token in ends and state.tokens > state.prompt_tokens
        found[row] = ended and int(inputs.token_ids[row, 0]) in fills
    return found

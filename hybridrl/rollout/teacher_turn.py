"""The rollouter of an engine that samples a teacher's responses."""

from dataclasses import replace

import numpy as np

from hybridrl.rollout.rollouter import Sample, join_turns
from hybridrl.teachers.context import Context
from hybridrl.types import Prompt, Trajectory


class TeacherTurn:
    """Samples one completion of the prompt that the teacher reads. The trajectory has it in the
    student's tokens, after the student's prompt.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    async def run(self, prompt: Prompt, sample: Sample) -> Trajectory:
        completion = await sample(self.context.prompt_ids(prompt))
        ids = self.context.exchanged(np.asarray(completion.token_ids, np.int32))
        of_student = replace(
            completion,
            token_ids=tuple(ids.tolist()),
            support_ids=self.context.exchanged(completion.support_ids),
        )
        return join_turns(prompt, [of_student])

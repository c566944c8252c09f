"""What takes seconds to import, once for all processes that the tests fork; a test process has one server for all."""

import pytest  # noqa: F401
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
import torch
import torch._dynamo  # connecting workers imports it, which takes longer than most of what these processes do
import torch.distributed
import torch.nn.parallel

import tests.crashes
import tests.trainer.tiny  # noqa: F401
import trainer.claim
import trainer.commands.train
import trainer.train  # noqa: F401

torch.set_num_threads(1)

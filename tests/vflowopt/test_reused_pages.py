"""What the last owner of a page left in it reaches nobody, not even as a number that attention masks."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.vflowopt.tiny_models import SHAPES, save
from vflowopt.runtime.cache import PagePool
from vflowopt.runtime.model_runner import Runtime

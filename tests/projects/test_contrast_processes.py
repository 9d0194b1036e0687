"""Recipes that compare the images of all processes: losses, gradients and buffers are those of one process."""

import contrast_cases
import pytest


@pytest.mark.integration
def test_two_processes_with_half_of_the_images_each(ranks):
    ranks(2, contrast_cases.__file__)

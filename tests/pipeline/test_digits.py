"""The built-in images are scikit-learn's digits, and reading them imports none of it."""

import subprocess
import sys

import numpy as np

from pipeline.digits import load_digit_arrays


def test_they_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    levels, labels = load_digit_arrays()
    images, targets = load_digits(return_X_y=True)
    assert np.array_equal(levels.reshape(len(levels), -1), images)
    assert np.array_equal(labels, targets)


READ = "import sys; from pipeline.digits import load_digit_arrays; load_digit_arrays(); print('sklearn' in sys.modules)"


def test_reading_them_does_not_import_scikit_learn() -> None:
    said = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True).stdout
    assert said == "False\n"

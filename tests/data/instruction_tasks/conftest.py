"""The made-up GLUE rows and tiny classifiers of `glue_fixtures`, for the tests of this folder."""

from glue_fixtures import *  # noqa: F403

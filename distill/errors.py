"""Errors a user can cause. The command prints each as one message and exits with 2."""


class UserError(Exception):
    """Something in a recipe, a file or an argument is wrong, and its owner can mend it."""


class RecipeError(UserError):
    """A recipe says something that cannot be: a key, a type, a value or a graph."""


class DataError(UserError):
    """A file or a table is not what the recipe says it is; names file, row or column."""


class RunError(Exception):
    """A run failed while it ran (exit code 1): what happened, what was kept, how to go on."""

def draw(*a):
    pass


def print_tables(*a):
    pass

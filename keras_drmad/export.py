def to_keras(o):
    raise NotImplementedError

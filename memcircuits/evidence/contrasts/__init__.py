"""How do recited texts differ from others? `contrast` compares two sets of paragraphs.

`contrast` is the measurement, `text_features` and `model_features` are the numbers of each
paragraph, and `result` holds them with their statistics.
"""

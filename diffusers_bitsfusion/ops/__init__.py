"""Operations on packed weights: each a plain torch reference with faster ways beside it and one selector."""

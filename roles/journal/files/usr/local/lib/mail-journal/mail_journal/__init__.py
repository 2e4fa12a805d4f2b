"""The message journal: what Postfix has accepted stands here and on the peer before the 250."""

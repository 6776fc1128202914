"""The proof: balanced models beside their base on text and tasks, with paired intervals."""

"""What a teacher expects of a text, as probabilities of sets of student tokens: the targets of `text-kl`."""

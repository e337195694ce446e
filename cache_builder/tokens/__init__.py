"""The text of a build in tokens: made once, part by part, by several processes, and read part by part by every builder."""

"""`llmc bench`: decode beside baselines at every batch size and length, as a record, a table and a picture.

request    what is asked for, parsed
subjects   MODEL or FILE.so -> an artifact, and what the baselines load in its place
baselines  who it is measured beside, and how each is started
memory     what a point needs
measure    the rounds
record     what was measured, on disk after every sample
page       a record as Markdown; README's part
draw       a record as a picture
"""

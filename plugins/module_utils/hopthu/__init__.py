"""The directory engine of Hộp Thư.

On the controller, files to the desired state, and back:
names      names of people and offices to local parts
files      YAML, CSV and JSON to records that know their line
schema     inventories/schema/*.json, compiled to checks of records
addresses  what policy gives to whom, and that nobody has what another has already
state      all of it together: a directory folder to the mailboxes that shall exist
export     a live tree back to a directory folder
report, slips, durable, variables   the plan for people, passwords on paper, files that survive a crash, inventories

On the managed host:
lifecycle  what happens to each mailbox, and whether its grounds carry it
plan       the difference to the live tree, in a safe order
fill       an empty tree by slapadd
mailboxes  what a mail store does to follow the directory
entries    slapd's own configuration and fixed tree

On both: passwords.
"""

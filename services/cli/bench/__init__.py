"""`nanodeploy bench`: load against an OpenAI endpoint, measured at the client."""

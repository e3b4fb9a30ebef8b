"""Soltani Moakhar et al., Seeking next layer neurons' attention: BackMAN."""

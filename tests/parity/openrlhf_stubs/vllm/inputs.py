TokensPrompt = None

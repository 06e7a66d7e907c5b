from streamcollapse.cli.main import main

main()

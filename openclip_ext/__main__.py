from openclip_ext.cli import main

raise SystemExit(main())
